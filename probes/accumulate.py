"""Exact, additive statistics over every real token of a step, in memory that no number of batches enlarges.

Shapes: B batch, T token, N stream, D feature. Sums are kept in float64 on the device; nothing is read back before `row`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch


class Sums:
    """The additive statistics of one chain: states, gradients and connection gains.

    Sums add over batches and processes; maxima (``norm_max``, ``abs_max``, ``gain_max``) combine by maximum.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, torch.Tensor]] = {}
        self.maxima: dict[str, dict[int, torch.Tensor]] = {}
        self._previous: tuple[int, torch.Tensor] | None = None

    def see_state(self, depth: int, state_BTND: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add one state.

        Parameters
        ----------
        depth : int
            Depth index.
        state_BTND : Tensor
            The canonical state.
        mask_BT : Tensor or None
            True on real tokens; None where all are real.
        """
        x = state_BTND.detach().float()
        norm = torch.linalg.vector_norm(x, dim=-1)
        count = torch.tensor(norm[..., 0].numel()) if mask_BT is None else mask_BT.sum()
        largest = x.abs().amax(-1)
        if mask_BT is not None:
            real = mask_BT.to(norm.dtype).unsqueeze(-1)
            norm, largest = norm * real, largest * real
            x = torch.where(mask_BT[..., None, None], x, 0.0)
        unit = x / norm.unsqueeze(-1).clamp_min(torch.finfo(x.dtype).tiny)
        self._add("token_count", depth, count.double())
        self._add("norm_sum", depth, norm.sum((0, 1), dtype=torch.float64))
        self._add("square_norm_sum", depth, norm.double().square().sum((0, 1)))
        self._add("feature_sum", depth, x.sum((0, 1), dtype=torch.float64))
        self._add("unit_sum", depth, unit.sum((0, 1), dtype=torch.float64))
        self._add("unit_count", depth, (norm > 0).sum((0, 1)).double())
        self._top("norm_max", depth, norm.amax((0, 1)).double())
        self._top("abs_max", depth, largest.amax((0, 1)).double())
        if (
            self._previous is not None
            and self._previous[0] == depth - 1
            and self._previous[1].shape == unit.shape
        ):
            cosine = (unit * self._previous[1]).sum(-1)
            self._add("adjacent_cosine_sum", depth, cosine.sum((0, 1), dtype=torch.float64))
        self._previous = depth, unit

    def see_gradient(self, depth: int, gradient_BTND: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add the gradient with respect to one state; padding carries gradient too, and is left out.

        Parameters
        ----------
        depth : int
            Depth index.
        gradient_BTND : Tensor
            The canonical gradient.
        mask_BT : Tensor or None
            True on real tokens.
        """
        square = gradient_BTND.detach().float().square().sum(-1)
        if mask_BT is not None:
            square = torch.where(mask_BT.unsqueeze(-1), square, 0.0)
        self._add("gradient_square_norm_sum", depth, square.sum((0, 1), dtype=torch.float64))

    def see_mixing(self, connection: int, mix_BTNN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add the Amax gains max_i |Σ_j H_ij| of one connection: over its last axis, and over the one before.

        Parameters
        ----------
        connection : int
            Connection index.
        mix_BTNN : Tensor
            The mixing matrix as the module keeps it; its orientation is settled later.
        mask_BT : Tensor or None
            True on real tokens.
        """
        mix = mix_BTNN.detach().double()
        gains = torch.stack([mix.sum(-1).abs().amax(-1), mix.sum(-2).abs().amax(-1)])
        if mask_BT is not None:
            gains = torch.where(mask_BT, gains, 0.0)
        self._add("gain_sum", connection, gains.sum((1, 2)))
        self._top("gain_max", connection, gains.amax((1, 2)))

    def end_forward(self) -> None:
        """Forget the last state: the next one belongs to another forward."""
        self._previous = None

    def merge(self, other: Sums) -> None:
        """Add the statistics of another part of the data.

        Parameters
        ----------
        other : Sums
            Of the same chain.
        """
        for name, parts in other.sums.items():
            for key, value in parts.items():
                self._add(name, key, value)
        for name, parts in other.maxima.items():
            for key, value in parts.items():
                self._top(name, key, value)

    def compact(self) -> Sums:
        """The same statistics without their feature axis, to be kept as one row among many.

        Returns
        -------
        Sums
            ``unit_sum`` gives way to ``unit_square``, its squared norm, and ``feature_sum`` is left out.
        """
        row = Sums()
        row.maxima = self.maxima
        row.sums = {
            name: parts for name, parts in self.sums.items() if name not in ("feature_sum", "unit_sum")
        }
        units = self.sums.get("unit_sum", {})
        row.sums["unit_square"] = {depth: unit.square().sum(-1) for depth, unit in units.items()}
        return row

    def array(self, name: str, keys: Sequence[int]) -> np.ndarray | None:
        """One statistic at some depths or connections, NaN where nothing was seen.

        Parameters
        ----------
        name : str
            Such as ``"norm_sum"``.
        keys : sequence of int
            Depth or connection indices, in order.

        Returns
        -------
        ndarray or None
            First axis as long as ``keys``; None where nothing was seen at any of them.
        """
        parts = self.sums.get(name) or self.maxima.get(name) or {}
        known = [parts[key] for key in keys if key in parts]
        if not known:
            return None
        missing = np.full(known[0].shape, np.nan)
        return np.stack([parts[key].cpu().numpy() if key in parts else missing for key in keys])

    def _add(self, name: str, key: int, value: torch.Tensor) -> None:
        _combine(self.sums.setdefault(name, {}), key, value, torch.add)

    def _top(self, name: str, key: int, value: torch.Tensor) -> None:
        _combine(self.maxima.setdefault(name, {}), key, value, torch.maximum)


def _combine(
    parts: dict[int, torch.Tensor],
    key: int,
    value: torch.Tensor,
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    held = parts.get(key)
    parts[key] = value if held is None else rule(held, value)


def merged(parts: list[Sums], more: list[Sums]) -> list[Sums]:
    """Add statistics chain by chain.

    Parameters
    ----------
    parts, more : list of Sums
        One per chain.

    Returns
    -------
    list of Sums
        The first list, enlarged and added to.
    """
    while len(parts) < len(more):
        parts.append(Sums())
    for part, other in zip(parts, more, strict=False):
        part.merge(other)
    return parts
