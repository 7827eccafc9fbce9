"""What do sums over every token give? Quantities of metrics, from the additive statistics of a run, with ``step`` first.

Each function takes the place of the quantity of its name where a run is measured by its sums: its parameters are variables of
/statistics, see `Quantities`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.quantities.registry import ratio
from depthscope.diagnostics.schema import WITHOUT_GRADIENT

EXACT = "exact over every token of the step"

ONE_VARIANT = {"scope": "data", "tokens": "all", "centering": "raw"}
"""Of the variants of a metric sums give one: that of all tokens pooled, as they are."""


def mean_square_norm(square_norm_sum: xr.DataArray, token_count: xr.DataArray) -> xr.DataArray:
    """Mean square of the norm of a token."""
    return square_norm_sum / token_count


def gradient_norms(gradient_square_norm_sum: xr.DataArray) -> xr.DataArray:
    """Norms of the gradient over all tokens."""
    return gradient_square_norm_sum**0.5


def gradient_facts(gradient_square_norm_sum: xr.DataArray) -> dict[str, Any]:
    """Which depths no gradient reached."""
    depths = gradient_square_norm_sum.attrs.get(WITHOUT_GRADIENT)
    return {WITHOUT_GRADIENT: depths} if depths else {}


def pair_cosines(unit_pair_sum: xr.DataArray, token_count: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The sum of the cosines of all ordered pairs of tokens, and their number."""
    return unit_pair_sum.expand_dims(list(ONE_VARIANT)), token_count * (token_count - 1)


def mean_adjacent_cosine(adjacent_cosine_sum: xr.DataArray, token_count: xr.DataArray) -> xr.DataArray:
    """Mean cosine of a token's state with the one before."""
    return adjacent_cosine_sum / token_count


def connection_gains(
    gain_sum: xr.DataArray, gain_max: xr.DataArray, token_count: xr.DataArray
) -> xr.DataArray:
    """Mean and largest Amax gain of every connection."""
    # No quantiles, which sums over batches cannot give.
    labels = xr.Variable("reduction", ["mean", "max"])
    return xr.concat([gain_sum / token_count, gain_max], labels, coords="minimal", compat="override")


def mean_entropy_share(
    attention_entropy_sum: xr.DataArray, attention_query_count: xr.DataArray
) -> xr.DataArray:
    """Mean entropy of each head, as a share of that of uniform weights."""
    return ratio(attention_entropy_sum, attention_query_count)


def mean_first_weight(sink_mass_sum: xr.DataArray, attention_query_count: xr.DataArray) -> xr.DataArray:
    """Mean weight of each head on the first key."""
    return ratio(sink_mass_sum, attention_query_count)


BY_SUMS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(mean_square_norm, gradient_norms, gradient_facts, pair_cosines, mean_adjacent_cosine),
        *(connection_gains, mean_entropy_share, mean_first_weight),
    )
}
"""Quantities that sums over every token supply, by name."""
