"""Which sums over every real token does a step give? Norms, directions, gains and gradients, in constant memory.

Shapes: B batch, T token, t the tokens of one block, N stream, D feature. A state is read from memory once, in
blocks that fit into the processor's cache. Vectors are added in float32 over the tokens of a block,
and in float64 over the blocks: relative to the sum of sizes, the error over 1e6 tokens was at most 1.2e-8. Everything stays on
the device; only `array` reads it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from depthscope.probes.connections.proof import Parts
from depthscope.probes.statistics.block_statistics import (
    BlockStatistics,
    Profile,
    block_statistics,
    blocks_of,
    joined,
    scaled_tokens,
    stream_cosines,
)
from depthscope.probes.statistics.live_sums import LiveSums, stream_cosine_sums, with_mean, with_sum

SQUARES = "gradient_square_norm_sum"


class TokenSums:
    """The additive statistics of one chain: states, gradients and connection gains.

    TokenSums add over batches and processes; maxima (``norm_max``, ``abs_max``, ``gain_max``) combine by maximum.

    ``live``: also takes what a live row needs; the sums of the mean over several streams are then in `mean_view`.
    """

    def __init__(self, live: LiveSums | None = None) -> None:
        self.live = live
        self.mean_view: TokenSums | None = None
        # Whether vectors are added in float64 over the tokens of a block too: then they do not depend on how tokens are
        # divided over processes.
        self.is_exact = False
        self.sums: dict[str, dict[int, torch.Tensor]] = {}
        self.maxima: dict[str, dict[int, torch.Tensor]] = {}
        self.latest: dict[str, dict[int, torch.Tensor]] = {}  # of the last part, as the values of weights
        self._last: tuple[int, torch.Size, torch.device] | None = None  # of the state before, and its depth
        self._units: deque[torch.Tensor] = deque()  # its tokens over their norms, block by block
        # One block's memory that is written again and again: allocating it anew would cost more than the sums themselves.
        self._spare: torch.Tensor | None = None

    def forget(self, *names: str) -> None:
        """Drop statistics that turned out to be of something else."""
        for name in names:
            self.sums.pop(name, None)
            self.maxima.pop(name, None)

    def add_state(self, depth: int, state_BTND: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add one state.

        ``mask_BT``: true on real tokens; None where all are real.
        """
        if not state_BTND.numel():  # an empty batch, of which no maximum exists
            return
        previous = self._units_before(depth, state_BTND)
        profile = joined(self._block_statistics(depth, state_BTND, mask_BT, previous))
        # Counted without reading the mask back from the device, which would wait for it.
        if mask_BT is None:
            count = torch.tensor(float(state_BTND.shape[0] * state_BTND.shape[1]), dtype=torch.float64)
        else:
            count = mask_BT.sum().double()
        if self.live is not None:
            self.live.sample_state(depth, state_BTND, mask_BT)
            self.live.add_values("largest", depth, profile.largest_tN)
        self._add_profile(depth, count, profile, state_BTND.shape[2])

    def _add_profile(self, depth: int, count: torch.Tensor, profile: Profile, num_streams: int) -> None:
        """Add the sums of a state; those of the mean over several streams, which come before theirs, to `mean_view`."""
        norm_tV = profile.norm_tN
        sums = {
            "norm_sum": norm_tV.sum(0),
            "square_norm_sum": norm_tV.square().sum(0),
            # A zero token, as padding is made, has no direction
            "unit_count": (norm_tV > 0).sum(0).double(),
            "feature_sum": profile.feature_sum_ND,
            "unit_sum": profile.unit_sum_ND,
        }
        if profile.cosine_sum_N is not None:
            sums["adjacent_cosine_sum"] = profile.cosine_sum_N
        maxima = {"norm_max": norm_tV.amax(0), "abs_max": profile.largest_tN.amax(0).double()}
        parts = [(self, slice(-num_streams, None))]
        if norm_tV.shape[1] > num_streams:
            self.mean_view = self.mean_view or TokenSums()
            parts.append((self.mean_view, slice(0, 1)))
        for part, views in parts:
            part._add("token_count", depth, count)
            part.add_values(
                depth,
                {name: value[views] for name, value in sums.items()},
                {name: value[views] for name, value in maxima.items()},
            )

    def _units_before(self, depth: int, state_BTND: torch.Tensor) -> deque[torch.Tensor]:
        """The unit vectors of the tokens one depth before; empty where these are other tokens."""
        previous, self._units = self._units, deque()
        # Cosines only with the depth directly before and with the same tokens: states may be skipped or downsampled.
        place = depth - 1, state_BTND.shape, state_BTND.device
        if self._last != place:
            previous.clear()
        self._last = depth, *place[1:]
        return previous

    def _block_statistics(
        self,
        depth: int,
        state_BTND: torch.Tensor,
        mask_BT: torch.Tensor | None,
        previous: deque[torch.Tensor],
    ) -> list[BlockStatistics]:
        """Statistics of a state block by block, each compared with the unit vectors of its tokens one depth before."""
        blocks: list[BlockStatistics] = []
        for x_tND in blocks_of(state_BTND, mask_BT):
            of_block = previous.popleft() if previous else None
            blocks.append(self._block(depth, x_tND, of_block))
            self._units.append(blocks[-1].unit_tND)
            self._spare = of_block  # used up by the cosines
        return blocks

    def _block(self, depth: int, x_tND: torch.Tensor, previous: torch.Tensor | None) -> BlockStatistics:
        """Statistics of some tokens, for a live row with the mean over streams and their cosines."""
        if self.live is None:
            return block_statistics(x_tND, previous, self._spare, is_exact=self.is_exact)
        block = block_statistics(with_mean(x_tND), previous, self._spare, is_exact=self.is_exact)
        if x_tND.shape[1] > 1:
            cosines = stream_cosine_sums(stream_cosines(x_tND), block.norm_tN[:, 1:])
            self.live.add_stream_cosines(depth, *cosines)
        return block

    def add_gradient(
        self, depth: int, gradient_BTND: torch.Tensor, mask_BT: torch.Tensor | None, *, anew: bool = False
    ) -> None:
        """Add the gradient with respect to one state; gradients on padding are left out.

        ``anew``: whether it replaces what was added for this depth so far.
        """
        if anew:
            for sums in (self, self.mean_view):
                if sums is not None:
                    sums.sums.get(SQUARES, {}).pop(depth, None)
        if not gradient_BTND.numel():
            return
        is_float64 = self.is_exact and gradient_BTND.dtype is torch.float64
        if self.live is not None:
            self.live.sample_gradient(depth, gradient_BTND, mask_BT)
        add = self._add_float64_squares if is_float64 else self._add_squares_of_blocks
        add(depth, gradient_BTND.detach(), mask_BT)

    def _add_squares_of_blocks(
        self, depth: int, gradient_BTND: torch.Tensor, mask_BT: torch.Tensor | None
    ) -> None:
        """Block by block; for a live row those of the sum over several streams come first."""
        for x_tND in blocks_of(gradient_BTND, mask_BT):
            _, largest, size = scaled_tokens(x_tND if self.live is None else with_sum(x_tND))
            self._add_squares(depth, largest.double().mul_(size).square_().sum((0, 2)), x_tND.shape[1])

    def _add_float64_squares(
        self, depth: int, gradient_BTND: torch.Tensor, mask_BT: torch.Tensor | None
    ) -> None:
        """Without rounding to float32, which would come before the factor by which processes weight their gradients."""
        x_tND = gradient_BTND.flatten(0, 1)
        squares = (x_tND if self.live is None else with_sum(x_tND)).square()
        if mask_BT is not None:
            squares = torch.where(mask_BT.flatten()[:, None, None], squares, 0.0)
        self._add_squares(depth, squares.sum((0, 2)), x_tND.shape[1])

    def _add_squares(self, depth: int, square_V: torch.Tensor, num_streams: int) -> None:
        if len(square_V) > num_streams:
            self.mean_view = self.mean_view or TokenSums()
            self.mean_view._add(SQUARES, depth, square_V[:1])
        self._add(SQUARES, depth, square_V[-num_streams:])

    def add_mixing(self, connection: int, mix_BTNN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add the Amax gains max_i |Σ_j H_ij| of one connection: over its last axis, and over the one before.

        ``mix_BTNN``: the mixing matrix as the module computes it; the proof decides later which axis is the
        destination.
        """
        if not mix_BTNN.numel():
            return
        if self.live is not None:  # which has them of every token
            gains = self.live.values["gain"][connection].mT
        else:
            # Sums of rows of tokens are twice as fast as of short rows
            mix = mix_BTNN.detach().flatten(0, 1).movedim(0, -1)
            mix = mix.to(torch.float64, memory_format=torch.contiguous_format)
            gains = torch.stack([mix.sum(1), mix.sum(0)]).abs().amax(1)
        if mask_BT is not None:
            gains = torch.where(mask_BT.flatten(), gains, 0.0)
        self._add("gain_sum", connection, gains.sum(1))
        self._add_maximum("gain_max", connection, gains.amax(1))

    def add_values(
        self,
        key: int,
        sums: Mapping[str, torch.Tensor],
        maxima: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Add sums, and maxima, of one depth or connection under their names."""
        for name, value in sums.items():
            self._add(name, key, value)
        for name, value in maxima.items():
            self._add_maximum(name, key, value)

    def end_forward(self) -> None:
        """Drop the last state: the next one belongs to another forward."""
        self._last = None
        self._units.clear()
        self._spare = None
        if self.live is not None:
            self.live.end_forward()

    def merge(self, other: TokenSums) -> None:
        """Add the statistics of another part of the data, of the same chain."""
        for name, parts in other.sums.items():
            for key, value in parts.items():
                self._add(name, key, value)
        for name, parts in other.maxima.items():
            for key, value in parts.items():
                self._add_maximum(name, key, value)
        for name, parts in other.latest.items():
            self.latest.setdefault(name, {}).update(parts)
        self._merge_live(other)

    def _merge_live(self, other: TokenSums) -> None:
        if other.live is not None:
            self.live = other.live if self.live is None else self.live.merged_with(other.live)
        if other.mean_view is not None:
            self.mean_view = self.mean_view or TokenSums()
            self.mean_view.merge(other.mean_view)

    def compact(self) -> TokenSums:
        """The same statistics without their feature axis, small enough for one row per measured step.

        ``unit_square``, the squared norm of ``unit_sum``, replaces it; ``feature_sum`` is left out.
        """
        row = TokenSums()
        row.maxima, row.latest = self.maxima, self.latest
        row.sums = {
            name: parts for name, parts in self.sums.items() if name not in ("feature_sum", "unit_sum")
        }
        units = self.sums.get("unit_sum", {})
        row.sums["unit_square"] = {depth: unit.square().sum(-1) for depth, unit in units.items()}
        return row

    def array(self, name: str, keys: Sequence[int]) -> np.ndarray | None:
        """One statistic at some depths or connections, NaN where nothing was added.

        Returns: First axis as long as ``keys``; None where nothing was added at any of them.
        """
        parts = self.sums.get(name) or self.maxima.get(name) or self.latest.get(name) or {}
        known = {key: parts[key] for key in keys if key in parts}
        if not known:
            return None
        if len({value.device for value in known.values()}) == 1:  # read back at once
            read = dict(zip(known, torch.stack(list(known.values())).cpu().numpy(), strict=True))
        else:
            read = {key: value.cpu().numpy() for key, value in known.items()}
        missing = np.full(next(iter(read.values())).shape, np.nan)
        return np.stack([read.get(key, missing) for key in keys])

    def keys(self, name: str) -> Sequence[int]:
        """The depths or connections at which something was added to a sum."""
        return tuple(self.sums.get(name, ()))

    def _add(self, name: str, key: int, value: torch.Tensor) -> None:
        parts = self.sums.setdefault(name, {})
        parts[key] = parts[key] + value if key in parts else value

    def _add_maximum(self, name: str, key: int, value: torch.Tensor) -> None:
        parts = self.maxima.setdefault(name, {})
        parts[key] = torch.maximum(parts[key], value) if key in parts else value


def merge_sums(parts: list[TokenSums], more: list[TokenSums]) -> list[TokenSums]:
    """Add the statistics ``more`` to ``parts`` chain by chain, in place; returns ``parts``, as long as the longer list."""
    while len(parts) < len(more):
        parts.append(TokenSums())
    for part, other in zip(parts, more, strict=False):
        part.merge(other)
    return parts


def coefficient_sums(parts: Parts, mask_BT: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Sums of H_res, H_pre and H_post of one call of a connection over its real tokens, in float64.

    ``mask_BT``: true on real tokens; None where all are real.
    Returns: ``h_res_sum`` (N, N) as the module computes it, ``h_pre_sum`` and ``h_post_sum`` (N), and
    ``h_pre_token_count``, the number of tokens in ``h_pre_sum``. Weights that do not exist, or have several views, are
    left out.
    """
    found: dict[str, torch.Tensor] = {}
    if parts.mix is not None:
        found["h_res_sum"] = _over_tokens(parts.mix, mask_BT)
    if parts.write.shape[-1] == 1:
        found["h_post_sum"] = _over_tokens(parts.write.squeeze(-1), mask_BT)
    read = parts.read
    if read is not None and read.shape[-2] == 1:
        found["h_pre_sum"] = _over_tokens(read.squeeze(-2), mask_BT)
        count = torch.tensor(float(read.shape[0] * read.shape[1])) if mask_BT is None else mask_BT.sum()
        found["h_pre_token_count"] = count.double()
    return found


def _over_tokens(weights: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    flat = weights.detach().flatten(0, 1)
    if mask_BT is not None:
        # Not times the mask: NaN on padding times 0 is NaN. Nor by a selection, which would wait for the device.
        real = mask_BT.flatten().to(flat.device).view(-1, *[1] * (flat.ndim - 1))
        flat = torch.where(real, flat, 0.0)
    return flat.sum(0, dtype=torch.float64)
