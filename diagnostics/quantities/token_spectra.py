"""Which singular values have the tokens? Of each sequence and of all pooled, and the ranks of noise of that size.

Shapes: ``V`` views of the streams, ``S`` sequences, ``T`` tokens, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import BLOCK, States, by_kind, mask_or_none, select_rows

RANKS = ("effective_rank", "participation_ratio")


@quantity
def singular_values(
    residual_states: States, token_masks: xr.Variable, scope: tuple[str, ...], centering: tuple[str, ...]
) -> xr.Variable:
    """Singular values of the tokens of each sequence and of all pooled; zero beyond the rank."""
    kinds = token_masks.values

    def decompose(views: np.ndarray) -> np.ndarray:
        return np.stack(by_kind(kinds, lambda counted: _spectra(views, counted, scope, centering)), axis=1)

    dims = ("tokens", "centering", "group", "component")
    return residual_states.over_depth(decompose, dims, by_view=True)


def _spectra(
    views: np.ndarray, counted: np.ndarray, scopes: tuple[str, ...], centering: tuple[str, ...]
) -> np.ndarray:
    """Spectra (V, centering, group, component) of the tokens that count, of views (V, S, T, D)."""
    num_groups = sum(len(counted) if scope == "sequence" else 1 for scope in scopes)
    width = min(counted.size, views.shape[-1])
    # Groups of fewer tokens have fewer values: the rest stays zero, which counts for no rank.
    spectra = np.zeros((len(views), len(centering), num_groups, width))
    # A few views at a time: a decomposition of all would take as many copies of large states in float64.
    at_once = max(1, BLOCK // max(1, views[0].size))
    for first in range(0, len(views), at_once):
        some = views[first : first + at_once]
        for c, label in enumerate(centering):
            center, group = label == "centred", 0
            if "sequence" in scopes:
                values = rank.singular_values(some, center=center, mask=mask_or_none(counted))
                group = values.shape[1]
                spectra[first : first + at_once, c, :group, : values.shape[-1]] = values
            if "data" in scopes:
                values = _pooled_spectra(some, counted, center=center)
                spectra[first : first + at_once, c, group, : values.shape[-1]] = values
    return spectra


def _pooled_spectra(views: np.ndarray, counted: np.ndarray, *, center: bool) -> np.ndarray:
    rows = select_rows(views, counted)
    # Kernels refuse a matrix without rows, as where every token is massive.
    return rank.singular_values(rows, center=center) if rows.shape[1] else np.zeros((len(views), 0))


def over_spectra(measure: Callable[[Any], Any], spectra: xr.Variable) -> xr.Variable:
    """Measure every spectrum; NaN where all its singular values are zero or undefined.

    ``measure``: singular values (..., component) in, values (...) out: a rank.
    """
    # Kernels refuse NaN, and give NaN for a spectrum of zeros.
    ordered = spectra.transpose(..., "component")
    values = measure(np.where(np.isnan(ordered.values), 0.0, ordered.values))
    return ordered.isel(component=0).copy(data=values)


@quantity
def noise_rows(token_counts: xr.Variable, centering: tuple[str, ...]) -> xr.Variable:
    """Degrees of freedom of noise, in rows: one fewer where the mean is removed; NaN for none."""
    # One token less its mean is zero: it has no spectrum, and so has its noise.
    of_each = {"raw": token_counts, "centred": (token_counts - 1.0).where(token_counts > 1)}
    return xr.Variable.concat([of_each[label] for label in centering], "centering")


@quantity
def num_features(residual_states: States) -> int:
    """The number of features of a state."""
    return residual_states.num_features


@lru_cache(maxsize=4096)
def noise_ranks(num_tokens: float, num_features: int) -> dict[str, float]:
    """The ranks of iid noise of that size, by the Marchenko-Pastur law; NaN for no tokens."""
    if np.isnan(num_tokens):
        return dict.fromkeys(RANKS, float("nan"))
    law = rank.marchenko_pastur(int(num_tokens), num_features)
    return {name: float(getattr(law, name)) for name in RANKS}
