"""What are the states, depth by depth? The mean over streams and each stream, one depth in memory at a time.

Shapes: ``V`` views of the streams (their mean, of gradients their sum; then each of several), ``S`` sequences, ``T`` tokens,
``D`` features, ``N`` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import xarray as xr

from depthscope.diagnostics.quantities.registry import Unavailable, quantity, stream_labels
from depthscope.diagnostics.schema import NOT_FINITE, STATE

# Bytes of states that are cached between metrics: 20 depths of 4096 tokens with 768 features in float32. Deeper ones are
# read again by each metric. Heuristic.
CACHE_BYTES = 256_000_000
# Numbers of one block of tokens, or of small states: its arrays of float64 stay in the cache of a core, and need no new
# memory. Heuristic.
BLOCK = 131_072


class States:
    """States of one chain, one depth in memory at a time: the mean over streams and each of several.

    ``states``: dims (depth, sample, token, stream, feature).
    ``mask``: dims (sample, token), true on real tokens.
    ``joined``: what the view of all streams together, labelled ``mean``, is of them: the ``"mean"`` of states, and the
    ``"sum"`` of gradients. Where all streams, and so their mean, move by the same δ, the loss changes by Σ_i ⟨∂L/∂x_i, δ⟩:
    the sum is the gradient with respect to the mean state, whatever the number of streams.
    ``cache_bytes``: most bytes of depths that are cached for the next metric.
    """

    def __init__(
        self,
        states: xr.DataArray,
        mask: xr.DataArray,
        *,
        joined: Literal["mean", "sum"] = "mean",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._states = states.transpose(*STATE)
        self._cache_bytes = cache_bytes
        self._joined = joined
        self.mask = mask.transpose("sample", "token").values.astype(bool)
        if not self.mask.any():
            raise Unavailable("the mask leaves no token: every position is marked as padding")
        self.num_features = states.sizes["feature"]
        self.num_streams = states.sizes["stream"]
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._num_not_finite: dict[str, int] = {}

    def __len__(self) -> int:
        return int(self._states.sizes["depth"])

    @property
    def streams(self) -> list[str]:
        """Labels of the views: ``mean`` and, for several streams, their numbers."""
        return stream_labels(self.num_streams + (self.num_streams > 1), self.num_streams)

    @property
    def finite_streams(self) -> np.ndarray:
        """Which streams of each depth are finite, (L, n)."""
        return np.stack([self.load(depth)[1][-self.num_streams :] for depth in range(len(self))])

    @property
    def not_finite(self) -> dict[str, dict[str, int]]:
        """Attribute for a metric that has read every depth: how many tokens are not finite, by depth; empty for none."""
        return {NOT_FINITE: dict(sorted(self._num_not_finite.items()))} if self._num_not_finite else {}

    def load(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one depth; cached for the next metric as long as the cache takes less than its limit.

        Returns: Zero on padding, and all zero in a view that is not finite; read-only.
        """
        if depth in self._cache:
            return self._cache[depth]
        found = self._read(depth)
        if found[0].nbytes + sum(views.nbytes for views, _ in self._cache.values()) <= self._cache_bytes:
            self._cache[depth] = found
        return found

    def _read(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        streams = np.moveaxis(self._states.variable[depth].values, -2, 0)
        # A view, not the user's array: it is marked read-only below. Padding may contain anything, NaN too: as zeros it adds
        # nothing to a sum, and does not count as not finite.
        streams = streams[:] if self.mask.all() else np.where(self.mask[..., None], streams, 0)
        finite = np.isfinite(streams).all(axis=(1, 2, 3))
        if not finite.all():
            bad_tokens = ~np.isfinite(streams).all(axis=(0, 3))
            self._num_not_finite[str(self._states["depth"].values[depth])] = int(bad_tokens.sum())
        if not finite.all():
            # Kernels refuse what is not finite. Zeros pass, and `over_depth` sets their results to NaN.
            streams = np.where(finite[:, None, None, None], streams, 0)
        if len(streams) > 1:
            # float64 sums: of many float32 streams that nearly cancel, the rounding would be the mean.
            # All zero where one stream is: the mean of the others is no state of the network.
            join = np.mean if self._joined == "mean" else np.sum
            together = (
                join(streams, axis=0, keepdims=True, dtype=np.float64).astype(streams.dtype) * finite.all()
            )
            streams, finite = np.concatenate([together, streams]), np.concatenate([[finite.all()], finite])
        streams.flags.writeable = False  # it is cached: a metric that wrote to it would change all later ones
        return streams, finite

    def rows(self, views: np.ndarray) -> np.ndarray:
        """The real tokens of views, sequences and tokens as one axis."""
        return select_rows(views, self.mask)

    def over_depth(
        self,
        measure: Callable[[np.ndarray], np.ndarray],
        dims: tuple[str, ...] = (),
        *,
        by_view: bool = False,
    ) -> xr.Variable:
        """Measure every depth and every view; NaN where a state is not finite.

        ``measure``: views (V, S, T, D) in, values (V, ...) out.
        ``dims``: names of the further dims of a value.
        ``by_view``: whether each view is measured for itself, so that those of several small states may come at once.
        """
        found: list[np.ndarray] = []
        at_once = max(1, BLOCK // max(1, self.load(0)[0].size)) if by_view else 1
        for first in range(0, len(self), at_once):
            loaded = [self.load(depth) for depth in range(first, min(first + at_once, len(self)))]
            views = loaded[0][0] if len(loaded) == 1 else np.concatenate([views for views, _ in loaded])
            values = np.asarray(measure(views), dtype=float)  # counts are integers, which have no NaN
            values[~np.concatenate([finite for _, finite in loaded])] = np.nan
            found += np.split(values, len(loaded))
        return xr.Variable(("depth", "stream", *dims), np.stack(found))

    def over_token_steps(
        self,
        measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
        summary: Callable[[np.ndarray], np.ndarray],
        dims: tuple[str, ...] = (),
    ) -> xr.Variable:
        """Measure every step from a depth to the next token by token, a few at a time, which takes less memory.

        ``measure``: views of some tokens before and after (V, n, D), float64, in, values (V, n, ...) out.
        ``summary``: values of all real tokens (V, N, ...) in, values (V, ...) out.
        ``dims``: names of the further dims of a value.
        Returns: Dims (depth, stream, *dims); NaN where either state is not finite.
        """

        def of_step(before: np.ndarray, after: np.ndarray) -> np.ndarray:
            parts = [
                measure(before[:, part].astype(np.float64), after[:, part].astype(np.float64))
                for part in row_blocks(before)
            ]
            return summary(np.concatenate(parts, axis=1))

        found: list[np.ndarray] = []
        views, finite_before = self.load(0)
        before = self.rows(views)
        for depth in range(1, len(self)):
            views, finite_after = self.load(depth)
            after = self.rows(views)
            values = np.asarray(of_step(before, after), dtype=float)
            values[~(finite_before & finite_after)] = np.nan
            found.append(values)
            before, finite_before = after, finite_after
        # The first depth ends no step. Where there is no other, measured against itself it has the shape of one.
        like = found[0] if found else np.asarray(of_step(before, before), dtype=float)
        return xr.Variable(("depth", "stream", *dims), np.stack([np.full_like(like, np.nan), *found]))

    def over_sequences(
        self, measure: Callable[[np.ndarray, np.ndarray | None], np.ndarray], masks: xr.Variable
    ) -> xr.Variable:
        """Measure every sequence.

        ``measure``: views (V, S, T, D) and a mask (S, T), None where all tokens count, in, values (V, S) out.
        ``masks``: dims (tokens, sample, token): which tokens count, by kind.
        """
        kinds = masks.values

        def measure_kinds(views: np.ndarray) -> np.ndarray:
            found = by_kind(kinds, lambda counted: _by_sequences(measure, views, counted))
            return np.stack(found, axis=1)

        found = self.over_depth(measure_kinds, ("tokens", "sequence"), by_view=True)
        return found.transpose("tokens", "depth", "stream", "sequence")


def _by_sequences(
    measure: Callable[[np.ndarray, np.ndarray | None], np.ndarray], views: np.ndarray, counted: np.ndarray
) -> np.ndarray:
    """Values (V, S) of views (V, S, T, D), a few sequences at a time: no sequence is measured with another."""
    size = max(1, BLOCK * len(counted) // views.size)
    parts = [slice(start, start + size) for start in range(0, len(counted), size)]
    return np.concatenate([measure(views[:, part], mask_or_none(counted[part])) for part in parts], axis=1)


def row_blocks(rows: np.ndarray) -> list[slice]:
    """The tokens of rows in blocks that are fast to compute with.

    ``rows``: of which only the shape is read.
    """
    views, count, features = rows.shape
    size = max(1, BLOCK // max(1, views * features))
    return [slice(start, start + size) for start in range(0, count, size)]


def select_rows(views: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Tokens that count as one axis, without a copy where all do."""
    return views.reshape(len(views), -1, views.shape[-1]) if counted.all() else views[:, counted]


def mask_or_none(counted: np.ndarray) -> np.ndarray | None:
    """A mask for a kernel; None, which is faster, where every token counts."""
    return None if counted.all() else counted


def by_kind(kinds: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Measure every kind of token; one with the same tokens as the first is not measured again."""
    found: list[np.ndarray] = []
    for counted in kinds:
        # Most runs have no massive activations: all tokens and the ordinary ones are the same.
        found.append(found[0] if found and np.array_equal(counted, kinds[0]) else measure(counted))
    return found


@quantity
def residual_states(residual: xr.DataArray, mask: xr.DataArray) -> States:
    """The residual, depth by depth."""
    return States(residual, mask)


@quantity
def stream_states(residual_states: States) -> States:
    """The residual of a run with several streams, for what compares one stream with another."""
    if residual_states.num_streams == 1:
        raise Unavailable("needs more than one stream; this run has one")
    return residual_states


@quantity
def gradient_states(gradient: xr.DataArray, mask: xr.DataArray) -> States:
    """The gradient of the loss with respect to the residual, depth by depth: of each stream, and their sum."""
    return States(gradient, mask, joined="sum")


# --- the mean over streams of every real token, all depths in memory at once


class MeanStates:
    """The mean over streams of every real token at every depth, loaded once.

    ``states``: the states.
    ``masks``: dims (tokens, sample, token): which tokens count, by kind.
    """

    def __init__(self, states: States, masks: xr.Variable) -> None:
        self._kinds = masks.values[:, states.mask]
        values, finite = [], []
        for depth in range(len(states)):
            views, of_views = states.load(depth)
            values.append(states.rows(views)[0])  # the first view is the mean
            finite.append(bool(of_views[0]))
        self.values = np.stack(values)
        self.finite = np.array(finite)

    @property
    def finite_pairs(self) -> np.ndarray:
        """Whether both depths of every pair are finite, (L, L): the others were replaced by zeros, see `States.load`."""
        return self.finite[:, None] & self.finite[None, :]

    def over_kinds(self, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Measure the tokens of each kind; what two kinds share is measured once.

        ``measure``: states (L, N, D) in, values (...) out.
        """

        def measure_kind(counted: np.ndarray) -> np.ndarray:
            # Without a copy where all tokens count: this is the largest array of an analysis.
            return measure(self.values if counted.all() else self.values[:, counted])

        return np.stack(by_kind(self._kinds, measure_kind))


@quantity
def mean_states(residual_states: States, token_masks: xr.Variable) -> MeanStates:
    """The mean over streams of every real token at every depth."""
    return MeanStates(residual_states, token_masks)
