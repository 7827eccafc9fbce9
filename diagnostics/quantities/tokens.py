"""Which tokens count? All real ones, or those without massive activations; and how many they are.

Shapes: ``V`` views of the streams, ``S`` sequences, ``T`` tokens, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import geometry
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States, mask_or_none, select_rows

# Features and tokens that an attribute names: trained models have fewer than ten massive features (Sun et al. 2024).
NUM_NAMED = 10


@dataclass(frozen=True)
class Massive:
    """Massive activations of a run: where they are and how large."""

    token: xr.Variable  # dims (sample, token): true where a token has one at any depth, in any stream
    fraction: xr.Variable  # dims (depth, stream): share of the real tokens that have one
    ratio: xr.Variable  # dims (depth, stream): the largest activation over the median one
    features: tuple[int, ...]  # features that have one
    tokens_per_sequence: float  # real tokens of a sequence that has some, the mean

    @property
    def locations(self) -> dict[str, list[Any]]:
        """Attributes: the first few features, and (sequence, position) of the first few tokens."""
        tokens = np.argwhere(self.token.values)
        return {
            "tokens_per_sequence": self.tokens_per_sequence,
            "massive_features": list(self.features[:NUM_NAMED]),
            "massive_tokens": tokens[:NUM_NAMED].tolist(),
        }

    def at(self, depths: list[int] | None) -> Massive:
        """The same at some depths: shares and ratios of these alone, tokens and features of all.

        ``depths``: positions on the depth axis; None for all.
        """
        if depths is None:
            return self
        return replace(self, fraction=self.fraction.isel(depth=depths), ratio=self.ratio.isel(depth=depths))

    @classmethod
    def joined(cls, parts: Sequence[Massive]) -> Massive:
        """The massive activations of blocks of depths together.

        ``parts``: in depth order, of the same tokens.
        """
        together = {
            name: xr.Variable.concat([getattr(part, name) for part in parts], "depth")
            for name in ("fraction", "ratio")
        }
        has_token = np.logical_or.reduce([part.token.values for part in parts])
        return replace(
            parts[0],
            token=parts[0].token.copy(data=has_token),
            features=tuple(sorted({feature for part in parts for feature in part.features})),
            **together,
        )


@quantity
def massive(residual_states: States) -> Massive:
    """Massive activations at every depth, found in one pass."""
    real = residual_states.mask
    has_token = np.zeros(real.shape, dtype=bool)
    has_feature = np.zeros(residual_states.num_features, dtype=bool)

    # Shares and ratios are of each depth, tokens and features of any depth: the latter are collected on the way.
    def measure(views: np.ndarray) -> np.ndarray:
        found = geometry.massive_activations(views, mask=mask_or_none(real))
        has_token[found.any(axis=(0, 3))] = True
        has_feature[found.any(axis=(0, 1, 2))] = True
        fraction = found.any(axis=3).sum(axis=(1, 2)) / real.sum()
        return np.stack([fraction, _largest_over_median(views, real)], axis=1)

    both = residual_states.over_depth(measure, ("measure",), by_view=True)
    return Massive(
        token=xr.Variable(("sample", "token"), has_token),
        fraction=both.isel(measure=0),
        ratio=both.isel(measure=1),
        features=tuple(np.flatnonzero(has_feature).tolist()),
        tokens_per_sequence=float(real.sum() / real.any(axis=1).sum()),
    )


def _largest_over_median(views: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The largest magnitude over the median non-zero one of views (V, S, T, D); NaN where all are zero."""
    found = np.full(len(views), np.nan)
    for number, view in enumerate(np.abs(select_rows(views, real))):
        # Most entries of a state after a ReLU may be zero, and so would their median be. Half of each: the median of an even
        # number is a mean of two, whose sum could exceed float32.
        halves = view[view > 0] / 2
        if halves.size:
            found[number] = halves.max() / np.median(halves)
    return found


@quantity
def token_masks(mask: xr.DataArray, massive: Massive, tokens: tuple[str, ...]) -> xr.Variable:
    """Which tokens count, by kind: all real ones, or those that are massive at no depth and in no stream.

    One mask for every depth, so that numbers at two depths are of the same tokens.
    """
    real = mask.variable.transpose("sample", "token")
    kinds = {"all": real, "ordinary": real & ~massive.token}
    return xr.Variable.concat([kinds[kind] for kind in tokens], "tokens")


@quantity
def token_counts(token_masks: xr.Variable, scope: tuple[str, ...]) -> xr.Variable:
    """How many tokens a number is computed from, by kind and group: each sequence, all pooled; NaN for none."""
    counts = token_masks.values.sum(axis=2)
    groups = {"sequence": counts, "data": counts.sum(axis=1, keepdims=True)}
    stacked = np.concatenate([groups[label] for label in scope], axis=1)
    return xr.Variable(("tokens", "group"), np.where(stacked > 0, stacked, np.nan))


def for_each_count(counts: xr.Variable, measure: Callable[[float], float]) -> xr.Variable:
    """A number that depends on how many tokens there are, as the null of a rank does, for each of several counts.

    ``counts``: numbers of tokens, any dims; NaN for none.
    """
    # Without otypes vectorize calls the function once more, to learn the dtype, and fails on an empty array.
    return xr.apply_ufunc(np.vectorize(measure, otypes=[float]), counts)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Positions of at most so many of ``count`` things, evenly spaced, the first and the last among them.

    ``count, most``: how many there are, and how many are wanted.

    Examples
    --------
    >>> evenly_spaced(9, 5).tolist()
    [0, 2, 4, 6, 8]
    """
    # Unique: halves are rounded to even numbers, so that 1.5 and 2.5 meet at 2.
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(int))
