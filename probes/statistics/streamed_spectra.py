"""Which variables does a run get from its streamed sums? Spectra of the moments, and HSIC between depths, over all tokens.

Shapes: D feature, L depth, g group of buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from depthscope.diagnostics import schema
from depthscope.probes.statistics.depth_sketch import estimate_hsic
from depthscope.probes.statistics.second_moments import Moments
from depthscope.probes.statistics.stored_sums import stored_variables
from depthscope.probes.statistics.streamed_sums import MEAN, StreamedSums

# Random perturbation of the products, as a share of their error bound, which text and other random data stay far below.
PERTURBATION = 1 / 8
CENTERING = np.array(["raw", "centred"], dtype=object)


def streamed_variables(
    streaming: StreamedSums, depths: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables and coordinates of the statistics of one stage, some depths of a chain."""
    sums = streaming.flushed()
    count = np.array([float(sums.moments[depth, MEAN].count) for depth in depths])
    # One in so many sequences was streamed: metrics and captions state it.
    sampling: dict[str, Any] = {"every": sums.every} if sums.every > 1 else {}
    left_out = sum(int(number) for key, number in sums.left_out.items() if set(depths) <= set(key))
    reason = {"left_out_because": "not finite at some depth: in no sum of any depth"} if left_out else {}
    variables: dict[str, Any] = {
        "streamed_count": ("depth", count, {"left_out": left_out, **reason, **sampling})
    }
    variables.update(_spectrum_variables(sums, depths, sampling))
    variables.update(stored_variables(sums, depths))
    coords: dict[str, Any] = {"centering": CENTERING}
    tables = depth_hsic(sums, depths)
    if tables is not None:
        for name, table in zip(("hsic", "hsic_without"), tables, strict=True):
            variables[name] = (schema.STATISTICS[name].dims, table.cpu().numpy(), sampling)
        coords["other_depth"] = np.array(depths)
    return variables, coords


def _spectrum_variables(
    sums: StreamedSums, depths: Sequence[int], sampling: dict[str, Any]
) -> dict[str, Any]:
    """Spectra of the mean over streams and of each stream; NaN where the streams one by one were left out."""
    moments = [sums.moments[depth, MEAN] for depth in depths]
    attrs = {"rounding": [of.rounding for of in moments], **sampling}  # relative to √(C_ii C_jj)
    if sums.streams_left_out:
        attrs["streams_left_out"] = sums.streams_left_out
    of_mean, of_streams = _depth_spectra(moments), _stream_spectra(sums, depths)
    if sums.num_streams == 1:
        of_streams = tuple(side[:, :, None] for side in of_mean)
    return {
        "eigenvalue": (schema.SPECTRUM, of_mean[0], attrs),
        "eigenvalue_shaken": (schema.SPECTRUM, of_mean[1], attrs),
        "stream_eigenvalue": (schema.STREAM_SPECTRUM, of_streams[0]),
        "stream_eigenvalue_shaken": (schema.STREAM_SPECTRUM, of_streams[1]),
    }


def _stream_spectra(sums: StreamedSums, depths: Sequence[int]) -> tuple[np.ndarray, ...]:
    found = [
        _depth_spectra([sums.moments[depth, view] for depth in depths])
        for view in range(1, sums.num_streams + 1)
        if (depths[0], view) in sums.moments
    ]
    if found:
        return tuple(np.stack(side, axis=2) for side in zip(*found, strict=True))
    width = len(sums.moments[depths[0], MEAN].mean_D)
    undefined = np.full((len(CENTERING), len(depths), sums.num_streams, width), np.nan)
    return undefined, undefined


def _depth_spectra(moments: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [moment_spectra(of) for of in moments]
    plain, perturbed = (
        torch.stack([values.cpu() for values in side], 1).numpy() for side in zip(*pairs, strict=True)
    )
    return plain, perturbed


def depth_hsic(streaming: StreamedSums, depths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """HSIC between the depths of a stage as `depth_sketch.estimate_hsic` returns it, (L, L) and (g, L, L).

    None where no sketch has every token, since the depths were not always of one width and number of tokens. Nothing may be
    buffered.
    """
    sketch = streaming.sketch_of(depths)
    return None if sketch is None else estimate_hsic(sketch)


def moment_spectra(of: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of Σ x xᵀ and of Σ (x − mean)(x − mean)ᵀ, descending; zero beyond the rank that the tokens allow.

    Returns: (2, D): raw and centred; and the same after each entry of the sums was changed, up or down at random, by
    more than the rounding of the products was seen to be. What changes with it is not known any better. NaN where a sum
    is not finite.
    """
    width, count = len(of.mean_D), int(of.count)
    if not bool(of.scatter_DD.isfinite().all()):
        undefined = of.mean_D.new_full((2, width), torch.nan)
        return undefined, undefined
    size = of.scatter_DD.diagonal().clamp_min(0).sqrt()
    signs = _random_signs(width).to(size.device, torch.float64)
    perturbation = signs.mul_(PERTURBATION * of.rounding * size[:, None]).mul_(size)
    perturbed_DD = perturbation.add_(of.scatter_DD)
    # Σ x xᵀ = C + n · mean meanᵀ; n tokens have n directions at most, n − 1 about their mean.
    plain, perturbed = (
        torch.stack(
            [
                _eigenvalues(sum_DD.addr(of.count * of.mean_D, of.mean_D), rank=count),
                _eigenvalues(sum_DD, rank=count - 1),
            ]
        )
        for sum_DD in (of.scatter_DD, perturbed_DD)
    )
    return plain, perturbed


def _eigenvalues(sums_DD: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvalues in descending order, read from the diagonal and what is right of it."""
    # LAPACK overflows where entries are near the largest float64: scaled to a largest diagonal entry of 1.
    largest = sums_DD.diagonal().amax().clamp_min(torch.finfo(torch.float64).tiny)
    values = torch.linalg.eigvalsh(sums_DD / largest, UPLO="U").flip(0).clamp_min(0) * largest
    values[max(rank, 0) :] = 0  # rounding only
    return values


@lru_cache(maxsize=1)  # all depths of a stage have one width
def _random_signs(width: int) -> torch.Tensor:
    """A symmetric matrix of random signs, the same each time; int8, since it stays in memory."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.randint(0, 2, (width, width), generator=generator, dtype=torch.int8).mul_(2).sub_(1).triu_()
    return upper + upper.triu(1).T
