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
    residual_states: States, token_masks: xr.DataArray, token_counts: xr.DataArray, centering: tuple[str, ...]
) -> xr.DataArray:
    """Singular values of the tokens of each sequence and of all pooled; zero beyond the rank."""
    kinds = token_masks.values
    # In the order of the groups, whose labels the spectra get; a set has no order.
    scopes = list(dict.fromkeys(token_counts["scope"].values.tolist()))

    def decompose(views: np.ndarray) -> np.ndarray:
        return np.stack(by_kind(kinds, lambda counted: _spectra(views, counted, scopes, centering)), axis=1)

    dims = ("tokens", "centering", "group", "component")
    labels = {"tokens": token_masks["tokens"], "centering": list(centering), "scope": token_counts["scope"]}
    return residual_states.over_depth(decompose, dims, **labels)


def _spectra(
    views: np.ndarray, counted: np.ndarray, scopes: list[str], centering: tuple[str, ...]
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


def over_spectra(measure: Callable[[Any], Any], spectra: xr.DataArray) -> xr.DataArray:
    """Measure every spectrum; NaN where all its singular values are zero or undefined.

    ``measure``: singular values (..., component) in, values (...) out: a rank.
    """
    # Kernels refuse NaN, and give NaN for a spectrum of zeros.
    return xr.apply_ufunc(measure, spectra.fillna(0.0), input_core_dims=[["component"]])


def free_rows(token_counts: xr.DataArray, centering: tuple[str, ...]) -> xr.DataArray:
    """Degrees of freedom of noise, in rows: one fewer where the mean is removed; NaN for none."""
    # One token less its mean is zero: it has no spectrum, and so has its noise.
    of_each = {"raw": token_counts, "centred": (token_counts - 1.0).where(token_counts > 1)}
    return xr.concat([of_each[label] for label in centering], xr.Variable("centering", list(centering)))


@lru_cache(maxsize=4096)
def noise_ranks(num_tokens: float, num_features: int) -> dict[str, float]:
    """The ranks of iid noise of that size, by the Marchenko-Pastur law; NaN for no tokens."""
    if np.isnan(num_tokens):
        return dict.fromkeys(RANKS, float("nan"))
    law = rank.marchenko_pastur(int(num_tokens), num_features)
    return {name: float(getattr(law, name)) for name in RANKS}
