"""What the streamed sums say of all tokens: the spectra of their moments and the similarity of depths, as a run keeps them.

Shapes: D feature, L depth, g group of buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from depthscope.diagnostics import schema
from depthscope.probes.statistics.depth_sketch import hsic
from depthscope.probes.statistics.second_moments import Moments
from depthscope.probes.statistics.stored_sums import kept
from depthscope.probes.statistics.streaming import MEAN, Streaming

SHAKEN = 1 / 8  # of what the products are off by at most: of text it is less, and at random
CENTERING = np.array(["raw", "centred"], dtype=object)


def streamed_variables(streaming: Streaming, depths: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables and coordinates of the statistics of one stage.

    Parameters
    ----------
    streaming : Streaming
        Of its chain.
    depths : sequence of int
        The depths of the stage.

    Returns
    -------
    variables, coords : dict
    """
    whole = streaming.settled()
    count = np.array([float(whole.moments[depth, MEAN].count) for depth in depths])
    left_out = sum(int(number) for key, number in whole.left_out.items() if set(depths) <= set(key))
    told = _why_fewer(left_out) | _of_part(whole)
    variables: dict[str, Any] = {"streamed_count": ("depth", count, told)}
    variables |= _of_views(whole, depths) | kept(whole, depths)
    coords: dict[str, Any] = {"centering": CENTERING}
    tables = similarity(whole, depths)
    if tables is not None:
        for name, table in zip(("hsic", "hsic_without"), tables, strict=True):
            variables[name] = (schema.STATISTICS[name].dims, table.cpu().numpy(), _of_part(whole))
        coords["other_depth"] = np.array(depths)
    return variables, coords


def _why_fewer(left_out: int) -> dict[str, Any]:
    because = "not finite at some depth: in no sum of any depth"
    return {"left_out": left_out, "left_out_because": because} if left_out else {"left_out": 0}


def _of_part(whole: Streaming) -> dict[str, Any]:
    """Of which sequences, where they are not all."""
    return {"every": whole.every} if whole.every > 1 else {}


def _of_views(whole: Streaming, depths: Sequence[int]) -> dict[str, Any]:
    """Spectra of the mean over streams, and of each stream: NaN where these were left out."""
    moments = [whole.moments[depth, MEAN] for depth in depths]
    told: dict[str, Any] = {"rounding": [of.rounding for of in moments]}  # relative to √(C_ii C_jj)
    told |= _of_part(whole)
    told |= {"streams_left_out": whole.unseen_streams} if whole.unseen_streams else {}
    of_mean, of_streams = _spectra_of(moments), _of_streams(whole, depths)
    if whole.num_streams == 1:
        of_streams = tuple(side[:, :, None] for side in of_mean)
    return {
        "eigenvalue": (schema.SPECTRUM, of_mean[0], told),
        "eigenvalue_shaken": (schema.SPECTRUM, of_mean[1], told),
        "stream_eigenvalue": (schema.STREAM_SPECTRUM, of_streams[0]),
        "stream_eigenvalue_shaken": (schema.STREAM_SPECTRUM, of_streams[1]),
    }


def _of_streams(whole: Streaming, depths: Sequence[int]) -> tuple[np.ndarray, ...]:
    found = []
    for view in range(1, whole.num_streams + 1):
        if (depths[0], view) in whole.moments:
            found.append(_spectra_of([whole.moments[depth, view] for depth in depths]))
    if found:
        return tuple(np.stack(side, axis=2) for side in zip(*found, strict=True))
    width = len(whole.moments[depths[0], MEAN].mean_D)
    nothing = np.full((len(CENTERING), len(depths), whole.num_streams, width), np.nan)
    return nothing, nothing


def _spectra_of(moments: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [spectra(of) for of in moments]
    plain, shaken = (torch.stack([v.cpu() for v in side], 1).numpy() for side in zip(*pairs, strict=True))
    return plain, shaken


def similarity(streaming: Streaming, depths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """HSIC between the depths of a stage, as `sketch.hsic` gives it.

    Parameters
    ----------
    streaming : Streaming
        Of its chain, nothing waiting.
    depths : sequence of int
        The depths of the stage.

    Returns
    -------
    (L, L) and (g, L, L), or None
        None where the depths were not always of one width and number of tokens, so that no sketch has seen every token.
    """
    sketch = streaming.sketch_of(depths)
    return None if sketch is None else hsic(sketch)


def spectra(of: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of Σ x xᵀ and of Σ (x − mean)(x − mean)ᵀ, descending; zero beyond the rank that the tokens allow.

    Parameters
    ----------
    of : Moments
        Of one depth.

    Returns
    -------
    plain, shaken : Tensor
        (2, D): raw and centred; and the same after each entry of the sums was moved, up or down at random, by somewhat
        more than the products were rounded by: what changes by it is not known any better. NaN where no sum is finite.
    """
    width, count = len(of.mean_D), int(of.count)
    if not bool(of.scatter_DD.isfinite().all()):
        nothing = of.mean_D.new_full((2, width), torch.nan)
        return nothing, nothing
    size = of.scatter_DD.diagonal().clamp_min(0).sqrt()
    moved = _signs(width).to(size.device, torch.float64).mul_(SHAKEN * of.rounding * size[:, None]).mul_(size)
    mean = (of.count * of.mean_D, of.mean_D)
    sums = (of.scatter_DD, moved.add_(of.scatter_DD))
    plain, shaken = (
        torch.stack([_eigenvalues(sum_DD.addr(*mean), count), _eigenvalues(sum_DD, count - 1)])
        for sum_DD in sums
    )
    return plain, shaken


def _eigenvalues(sums_DD: torch.Tensor, rank: int) -> torch.Tensor:
    """Descending, of what is on and right of the diagonal; not scaled, an entry near the largest float would overflow."""
    top = sums_DD.diagonal().amax().clamp_min(torch.finfo(torch.float64).tiny)
    values = torch.linalg.eigvalsh(sums_DD / top, UPLO="U").flip(0).clamp_min(0) * top
    values[max(rank, 0) :] = 0
    return values


@lru_cache(maxsize=1)
def _signs(width: int) -> torch.Tensor:
    """A symmetric matrix of random signs, the same each time, in few bytes."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.randint(0, 2, (width, width), generator=generator, dtype=torch.int8).mul_(2).sub_(1).triu_()
    return upper + upper.triu(1).T
