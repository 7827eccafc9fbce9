"""What do tokens attend to? Entropy of the attention weights of each head, and the weight that the first token takes."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.quantities.registry import Unavailable, quantity

PER_HEAD = "mean over the real queries of a sequence that see two keys or more, then over sequences"


def _over_queries(values: xr.DataArray, keys: xr.DataArray, mask: xr.DataArray) -> xr.DataArray:
    """Mean over the queries that have a choice, by sequence, depth and head."""
    if not bool(mask.any()):
        raise Unavailable("the mask leaves no token: every position is marked as padding")
    # A query that sees one key has weight 1 on it, and entropy 0, whatever the network does.
    chosen = values.where(mask & (keys >= 2)).astype(np.float64)
    mean = chosen.mean("token").transpose("sample", "depth", "head").rename(sample="sequence")
    return mean.drop_vars("sequence", errors="ignore")


@quantity
def mean_entropy_share(
    query_entropy: xr.DataArray, query_keys: xr.DataArray, mask: xr.DataArray
) -> xr.DataArray:
    """Mean entropy of each head and sequence, as a share of that of uniform weights."""
    # log of one key is 0, of which `_over_queries` takes none.
    share = query_entropy / np.log(query_keys.where(query_keys >= 2))
    return _over_queries(share, query_keys, mask)


@quantity
def mean_first_weight(
    query_first_weight: xr.DataArray, query_keys: xr.DataArray, mask: xr.DataArray
) -> xr.DataArray:
    """Mean weight of each head and sequence on the first key."""
    return _over_queries(query_first_weight, query_keys, mask)


@metric(
    symbol=r"H(A_i) / \log k_i",
    dims="depth head",
    cite="zhai2023stabilizing",
    basis="invariant",
    null=1.0,  # uniform weights
    estimator=PER_HEAD,
)
def attention_entropy(mean_entropy_share: xr.DataArray) -> xr.DataArray:
    r"""Entropy of a head's attention weights, as a share of that of uniform ones.

    .. math:: \frac{-\sum_j A_{ij} \log A_{ij}}{\log k_i}

    A is the softmax over the k keys that query i may see, before dropout. 1 where it attends to all of them equally, 0
    where to one alone. The paper states the entropy in nats, which grows with the number of keys; a share compares
    queries of a causal model. At the depth that the attention leads to: NaN at those that none leads to.
    """
    return mean_entropy_share


def _uniform_sink(query_keys: xr.DataArray, mask: xr.DataArray) -> xr.DataArray:
    """The mean of one over the number of keys: what uniform weights give any one key."""
    return _over_queries(1 / query_keys.where(query_keys >= 2), query_keys, mask)


@metric(
    symbol=r"\overline{A_{i1}}",
    dims="depth head",
    cite="gu2025attention",
    basis="invariant",
    null=_uniform_sink,
    estimator=PER_HEAD,
)
def sink_mass(mean_first_weight: xr.DataArray) -> xr.DataArray:
    r"""Attention weight on the first token: how much of a head's attention goes to a sink.

    .. math:: \frac{1}{T - 1} \textstyle\sum_{i>1} A_{i1}

    The first of the keys that a query may see; the paper counts a head as one with a sink above 0.3. The null is
    uniform attention, the mean of 1/k.
    """
    return mean_first_weight
