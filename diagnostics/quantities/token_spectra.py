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
from depthscope.diagnostics.quantities.states import States, by_kind, mask_or_none, select_rows

RANKS = ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


@quantity
def singular_values(
    residual_states: States, token_masks: xr.Variable, scope: tuple[str, ...], centering: tuple[str, ...]
) -> xr.Variable:
    """Singular values of the tokens of each sequence and of all pooled; zero beyond the rank."""
    kinds = token_masks.values

    def decompose(views: np.ndarray) -> np.ndarray:
        return np.stack(by_kind(kinds, lambda counted: _spectra(views, counted, scope, centering)), axis=1)

    return residual_states.over_depth(decompose, ("tokens", "centering", "group", "component"))


def _spectra(
    views: np.ndarray, counted: np.ndarray, scopes: tuple[str, ...], centering: tuple[str, ...]
) -> np.ndarray:
    """Spectra (V, centering, group, component) of the tokens that count, of views (V, S, T, D)."""
    num_groups = sum(len(counted) if scope == "sequence" else 1 for scope in scopes)
    width = min(counted.size, views.shape[-1])
    # Groups of fewer tokens have fewer values: the rest stays zero, which counts for no rank.
    spectra = np.zeros((len(views), len(centering), num_groups, width))
    # View by view: a batched decomposition of all would take as many copies of the states in float64.
    for v, view in enumerate(views):
        for c, label in enumerate(centering):
            found: list[np.ndarray] = []
            if "sequence" in scopes:
                found += list(
                    rank.singular_values(view, center=label == "centred", mask=mask_or_none(counted))
                )
            if "data" in scopes:
                found.append(_pooled_spectrum(view, counted, center=label == "centred"))
            for group, values in enumerate(found):
                spectra[v, c, group, : len(values)] = values
    return spectra


def _pooled_spectrum(view: np.ndarray, counted: np.ndarray, *, center: bool) -> np.ndarray:
    rows = select_rows(view[None], counted)
    # Kernels refuse a matrix without rows, as where every token is massive.
    return rank.singular_values(rows, center=center)[0] if rows.shape[1] else np.zeros(0)


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
