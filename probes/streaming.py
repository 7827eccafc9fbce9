"""Moments of second order over every real token, in one pass and in memory that no number of batches enlarges.

Shapes: B batch, T token, t = B T, N stream, D feature. A forward's tokens are taken about their own mean and multiplied in
float32 blocks, and all else is float64: exact to about 2e-7 at any common offset. Of several streams the mean is seen.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch

from probes.sketch import Rows, Sketch, joined, sketched, token_index

ADDED = 4096  # tokens in a block at most, since they are added in float32
STRIP = 192  # features: whole strips left of the diagonal are not computed
TINY = torch.finfo(torch.float32).tiny


class Moments(NamedTuple):
    """Count, mean and Σ (x − mean)(x − mean)ᵀ of some tokens, float64; what lies left of the diagonal is not meant."""

    count: torch.Tensor
    mean_D: torch.Tensor
    scatter_DD: torch.Tensor


class Held(NamedTuple):
    """A depth of the present forward, kept until its end: which tokens are heavy is known only then."""

    shape: torch.Size
    rows: Rows
    real_BT: torch.Tensor | None


class Streaming:
    """The moments of every depth and the sketches over depths of one chain.

    Parameters
    ----------
    first_index : int
        Index of the first sequence of the forward that is to be seen.
    """

    def __init__(self, first_index: int = 0) -> None:
        self.first_index = first_index
        self.moments: dict[int, Moments] = {}
        self.sketches: dict[tuple[int, ...], Sketch] = {}
        self._held: dict[int, Held] = {}

    def see_state(
        self, depth: int, state_BTND: torch.Tensor, mask_BT: torch.Tensor | None, mean_ND: torch.Tensor
    ) -> None:
        """Add one state.

        Parameters
        ----------
        depth : int
            Depth index.
        state_BTND : Tensor
            The canonical state.
        mask_BT : Tensor or None
            True on real tokens; None where all are real.
        mean_ND : Tensor
            The mean of its real tokens, which products are taken about.
        """
        shift_ND = mean_ND.to(torch.promote_types(state_BTND.dtype, torch.float32))
        deviation = state_BTND.detach() - shift_ND  # stream by stream, where the difference is exact
        deviation = deviation.mean(2) if deviation.shape[2] > 1 else deviation.squeeze(2)
        if mask_BT is not None:
            deviation = torch.where(mask_BT[..., None], deviation, 0.0)
        deviation_tD, shift_D = deviation.flatten(0, 1).float(), shift_ND.double().mean(0)
        size = torch.maximum(deviation_tD.amax(), -deviation_tD.amin()).clamp_min(TINY)
        rows = Rows(
            deviation_tD.mul_(size.reciprocal()), size.double(), shift_D
        )  # no square vanishes or overflows
        count = size.new_tensor(len(deviation_tD)) if mask_BT is None else mask_BT.sum()
        self.moments[depth] = moments(rows, count.double())
        self._held[depth] = Held(state_BTND.shape, rows, mask_BT)

    def end_forward(self) -> None:
        """Sketch the depths of the forward together, each stage of one width and number of tokens by itself."""
        for shape, stage in groupby(sorted(self._held), key=lambda depth: self._held[depth].shape):
            depths = tuple(stage)
            held = [self._held[depth] for depth in depths]
            index = token_index(self.first_index, shape[0], shape[1], held[0].rows.deviation_tD.device)
            real = held[0].real_BT
            rows = [part.rows for part in held]
            self.sketches[depths] = sketched(rows, index, None if real is None else real.flatten())
        self._held.clear()

    def joined(self, other: Streaming) -> Streaming:
        """What both have seen; neither is written.

        Parameters
        ----------
        other : Streaming
            Of the same chain, over other tokens.

        Returns
        -------
        Streaming
        """
        both = Streaming()
        both.moments = self.moments | other.moments
        for depth in self.moments.keys() & other.moments.keys():
            both.moments[depth] = together(self.moments[depth], other.moments[depth])
        both.sketches = self.sketches | other.sketches
        for depths in self.sketches.keys() & other.sketches.keys():
            both.sketches[depths] = joined(self.sketches[depths], other.sketches[depths])
        return both


def moments(rows: Rows, count: torch.Tensor) -> Moments:
    """The moments of tokens near a shift.

    Parameters
    ----------
    rows : Rows
        The tokens less the shift; the nearer it is to their mean, the less is lost.
    count : Tensor
        How many are real.

    Returns
    -------
    Moments
    """
    blocks = rows.deviation_tD.split(ADDED)
    scatter, total_D = _product(blocks[0]).double(), blocks[0].sum(0).double()
    for block in blocks[1:]:
        scatter += _product(block)
        total_D += block.sum(0)
    away_D = total_D / count.clamp_min(1)
    scatter = scatter.addr_(-total_D, away_D).mul_(rows.size.square())
    return Moments(count, rows.shift_D + away_D * rows.size, scatter)


def _product(block_tD: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of features on and right of the diagonal; in float64 where the user lets float32 be rounded further."""
    exact = block_tD if torch.get_float32_matmul_precision() == "highest" else block_tD.double()
    width = exact.shape[1]
    upper = exact.new_zeros(width, width)
    for start in range(0, width, STRIP):
        upper[start : start + STRIP, start:] = exact[:, start : start + STRIP].T @ exact[:, start:]
    return upper


def together(a: Moments, b: Moments) -> Moments:
    """The moments of two parts of the tokens (Chan, Golub and LeVeque).

    Parameters
    ----------
    a, b : Moments
        Of the parts.

    Returns
    -------
    Moments
    """
    count = a.count + b.count
    share, apart_D = b.count / count.clamp_min(1), b.mean_D - a.mean_D
    scatter = (a.scatter_DD + b.scatter_DD).addr_(a.count * share * apart_D, apart_D)
    return Moments(count, a.mean_D + share * apart_D, scatter)
