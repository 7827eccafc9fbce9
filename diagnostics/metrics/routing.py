"""Which experts do routers choose? The share of choices that goes to each, and how undecided the scores are."""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.quantities.registry import ratio

EVERY_TOKEN = "exact, over every real token of the step"


@metric(
    symbol=r"E f_i",
    dims="depth expert",
    label="load of an expert",
    cite="fedus2022switch",
    basis="invariant",
    null=1.0,  # all are chosen equally often
    estimator=EVERY_TOKEN,
)
def expert_load(expert_token_count: xr.DataArray) -> xr.DataArray:
    r"""How often a router chooses an expert, relative to a router that chooses all of them equally often.

    .. math:: E \cdot \frac{c_i}{\sum_j c_j}

    c_i tokens choose expert i of E; a token that chooses several counts for each. 0 for an expert that no token chooses, whose
    gradient is exactly zero. At the depth that the experts lead to: NaN at those that none leads to. What a router chooses is
    counted before any limit of capacity; choices of tokens by experts are not seen.
    """
    experts = expert_token_count.notnull().sum("expert")
    return ratio(expert_token_count, expert_token_count.sum("expert", skipna=True)) * experts


@metric(
    symbol=r"H(p) / \log E",
    dims="depth",
    cite="fedus2022switch",
    basis="invariant",
    null=1.0,  # uniform scores
    estimator=EVERY_TOKEN,
)
def router_entropy(router_entropy_sum: xr.DataArray, routed_token_count: xr.DataArray) -> xr.DataArray:
    r"""Entropy of a router's scores of a token, as a share of that of uniform ones.

    .. math:: \frac{-\sum_i p_i \log p_i}{\log E}

    p are the scores among which the router chooses, over their sum where none is negative (as of a softmax or a sigmoid), else
    their softmax. 1 where all experts are as good as each other, 0 where one is certain.
    """
    return ratio(router_entropy_sum, routed_token_count)
