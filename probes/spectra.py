"""What the streamed sums say of all tokens: the spectra of their moments and the similarity of depths, as a run keeps them.

Shapes: D feature, L depth, g group of buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from diagnostics import schema
from probes.sketch import hsic
from probes.streaming import Moments, Streaming

ROUNDING = (
    2.0**-21
)  # relative to √(C_ii C_jj): some times what float32 blocks were off by, to be seen beside it


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
    pairs = [spectra(streaming.moments[depth]) for depth in depths]
    plain, shaken = (
        torch.stack([values.cpu() for values in side], 1).numpy() for side in zip(*pairs, strict=True)
    )
    count = np.array([float(streaming.moments[depth].count) for depth in depths])
    variables: dict[str, Any] = {
        "streamed_count": ("depth", count),
        "eigenvalue": (schema.SPECTRUM, plain),
        "eigenvalue_shaken": (schema.SPECTRUM, shaken),
    }
    coords: dict[str, Any] = {"centering": np.array(["raw", "centred"], dtype=object)}
    tables = similarity(streaming, depths)
    if tables is not None:
        for name, table in zip(("hsic", "hsic_without"), tables, strict=True):
            variables[name] = (schema.STATISTICS[name].dims, table.cpu().numpy())
        coords["other_depth"] = np.array(depths)
    return variables, coords


def similarity(streaming: Streaming, depths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """HSIC between the depths of a stage, as `sketch.hsic` gives it.

    Parameters
    ----------
    streaming : Streaming
        Of its chain.
    depths : sequence of int
        The depths of the stage.

    Returns
    -------
    (L, L) and (g, L, L), or None
        None where the depths were not always of one width and number of tokens, so that no sketch has seen every token.
    """
    key = next((key for key in streaming.sketches if set(depths) <= set(key)), None)
    whole = [streaming.moments[depth] for depth in depths]
    if key is None or float(streaming.sketches[key].count) != float(whole[0].count):
        return None
    sketch, near = streaming.sketches[key], streaming.sketches[key].signs_m.device
    places = torch.tensor([key.index(depth) for depth in depths], device=near)
    chosen = sketch._replace(buckets_LmD=sketch.buckets_LmD[places], heavy_LhD=sketch.heavy_LhD[places])
    mean = torch.stack([of.mean_D.to(near) for of in whole])
    trace = torch.stack([of.scatter_DD.trace().to(near) for of in whole])
    return hsic(chosen, mean, trace)


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
        more than float32 rounds: what changes by it is not known any better. NaN where a state was not finite.
    """
    width, count = len(of.mean_D), int(of.count)
    if not bool(of.scatter_DD.isfinite().all()):
        nothing = of.mean_D.new_full((2, width), torch.nan)
        return nothing, nothing
    size = of.scatter_DD.diagonal().clamp_min(0).sqrt()
    shaken = of.scatter_DD + ROUNDING * size.outer(size) * _signs(width).to(size.device)
    mean = (of.count * of.mean_D).outer(of.mean_D)
    four = torch.stack([of.scatter_DD + mean, of.scatter_DD, shaken + mean, shaken])
    top = four.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    values = torch.linalg.eigvalsh(four / top[..., None], UPLO="U").flip(1).clamp_min(0) * top
    for row, rank in enumerate((count, count - 1) * 2):
        values[row, max(rank, 0) :] = 0
    return values[:2], values[2:]


def _signs(width: int) -> torch.Tensor:
    """A symmetric matrix of random signs, the same each time."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.randint(0, 2, (width, width), generator=generator).mul(2).sub(1).double().triu()
    return upper + upper.triu(1).T
