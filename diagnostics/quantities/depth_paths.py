"""How does an output reach a later sublayer? The depth kernel M of every linear connection, whatever its parts are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.quantities.mixing_matrices import BLOCK, Mixing, real_tokens, require_finite
from depthscope.diagnostics.quantities.path_kinds import (
    DepthPaths,
    Order,
    PlainPaths,
    SourcePaths,
    StreamPaths,
)
from depthscope.diagnostics.quantities.registry import Unavailable, missing, quantity
from depthscope.diagnostics.schema import PROVEN, UNPROVEN


@quantity(roots=("h_res", "h_pre", "h_post"))
def depth_paths(
    mask: xr.DataArray,
    attrs: Mapping[str, Any],
    mixing: Mixing | None = None,
    h_res: xr.DataArray | None = None,
    h_pre: xr.DataArray | None = None,
    h_post: xr.DataArray | None = None,
    read: xr.DataArray | None = None,
    write: xr.DataArray | None = None,
    residual_scale: xr.DataArray | None = None,
    branch_scale: xr.DataArray | None = None,
    residual_gate: xr.DataArray | None = None,
    branch_gate: xr.DataArray | None = None,
    depth_read: xr.DataArray | None = None,
    depth_carry: xr.DataArray | None = None,
    depth_in: xr.DataArray | None = None,
) -> DepthPaths:
    """The paths of a chain, from whichever parts its connections have."""
    if depth_read is not None:
        return _source_paths(depth_read, mask)
    if depth_carry is not None:
        return _carried_paths(depth_carry, branch_scale, mask)
    if h_res is not None:
        mixing = Mixing(h_res, mask) if mixing is None else mixing
        reads, writes = _stream_weights(h_pre, h_post, read, write, mask)
        return StreamPaths(mixing, reads, writes, _order_of(h_res))
    if depth_in is None:
        raise Unavailable(
            "the run has no connections, which a capture of one stream keeps where they are named: "
            "sites=['embed', 'post', 'branch_out']"
        )
    _require_plain(
        depth_in, attrs, after_sum_is_known=residual_scale is not None or residual_gate is not None
    )
    keeps = _factor(residual_scale, residual_gate, depth_in, mask)
    writes = _factor(branch_scale, branch_gate, depth_in, mask)
    if keeps.ndim != writes.ndim:  # gates on one side only
        keeps, writes = np.broadcast_arrays(
            *(each if each.ndim == 3 else each[..., None] for each in (keeps, writes))
        )
    _require_joined(depth_in)
    return PlainPaths(keeps, writes, _order_of(depth_in))


def _stream_weights(
    h_pre: xr.DataArray | None,
    h_post: xr.DataArray | None,
    read: xr.DataArray | None,
    write: xr.DataArray | None,
    mask: xr.DataArray,
) -> tuple[np.ndarray, np.ndarray]:
    """Read weights (C, N, V, n) and write weights (C, N, n, V)."""
    if h_pre is not None:
        reads = require_finite(real_tokens(h_pre, mask), h_pre)[:, :, None]
    elif read is not None:
        reads = real_tokens(read.transpose(..., "view_in", "stream"), mask)
    else:
        raise missing("h_pre")
    if h_post is not None:
        writes = require_finite(real_tokens(h_post, mask), h_post)[..., None]
    elif write is not None:
        writes = real_tokens(write.transpose(..., "stream", "view_out"), mask)
    else:
        raise missing("h_post")
    return reads, writes


def _order_of(values: xr.DataArray) -> Order:
    """The order of the connections by their depths, those of a run by hand one after the other."""
    coords, count = values.coords, values.sizes["connection"]
    numbers = coords["connection"].values if "connection" in coords else np.arange(count)
    if (np.diff(numbers) != 1).any() or numbers[0] != 0:
        raise Unavailable(
            "some connections were left out by sites=, so that what passes them is unknown: capture all of them"
        )
    if "depth_in" not in coords or "depth_out" not in coords:
        return Order(tuple(range(count)))
    ends = list(zip(coords["depth_in"].values.tolist(), coords["depth_out"].values.tolist(), strict=True))
    # Branches between the same two depths are parallel.
    applied = np.cumsum([number > 0 and ends[number] != ends[number - 1] for number in range(count)]).tolist()
    return Order(tuple(applied))


def _require_plain(depth_in: xr.DataArray, attrs: Mapping[str, Any], *, after_sum_is_known: bool) -> None:
    """Refuse a chain of one state whose connections are not proven to be plain sums."""
    proof, family = str(attrs.get("proof", "")), str(attrs.get("family", "residual"))
    if proof.startswith(UNPROVEN):
        raise Unavailable(f"that the connections are plain sums is {proof}")
    if family != "residual":
        raise Unavailable(
            f"the connections of the family {family} are not plain, and the run has no weights of them"
        )
    if proof != PROVEN:
        raise Unavailable(
            "that the connections are plain sums is not stated to be proven; capture it anew with this version"
        )
    known = {str(name): of.values.tolist() for name, of in depth_in.coords.items()}
    for number, each in enumerate(known.get("proof", ())):
        if each != PROVEN:
            raise Unavailable(f"connection {number} is {each}")
    for number, after in enumerate(known.get("after_sum", ())):
        if after and not after_sum_is_known:
            raise Unavailable(
                f"the state after connection {number} is a {after} of the sum, whose factor the run does not have"
            )


def _require_joined(depth_in: xr.DataArray) -> None:
    """Refuse plain connections with a gap between them: what the state goes through there is unknown."""
    if "depth_out" not in depth_in.coords:
        return
    starts, ends = depth_in.values.tolist(), depth_in.coords["depth_out"].values.tolist()
    for number in range(1, len(starts)):
        if starts[number] != ends[number - 1] and starts[number] != starts[number - 1]:
            raise Unavailable(
                f"connection {number - 1} ends at depth {ends[number - 1]} and the next begins at depth {starts[number]}: "
                "what the state goes through between them is not known"
            )


def _factor(
    scale: xr.DataArray | None, gate: xr.DataArray | None, like: xr.DataArray, mask: xr.DataArray
) -> np.ndarray:
    """Scale times gate of every real token, (C, N) or (C, N, D); ones where the run has neither."""
    found = np.ones((like.sizes["connection"], int(mask.sum())))
    if scale is not None:
        found = require_finite(real_tokens(scale, mask), scale)
    if gate is not None:
        found = found[..., None] * require_finite(real_tokens(gate, mask), gate)
    if not mask.any():
        raise Unavailable("the mask leaves no token: every position is marked as padding")
    return found


def _source_paths(depth_read: xr.DataArray, mask: xr.DataArray) -> SourcePaths:
    weights = require_finite(real_tokens(depth_read, mask), depth_read)
    _require_all_sources(depth_read)
    for number in range(len(weights)):
        if weights[number, :, number + 1 :].any():
            raise Unavailable(
                f"depth_read of connection {number} has a weight on source {number + 1} or later, which comes after it"
            )
    return SourcePaths(weights)


def _require_all_sources(values: xr.DataArray) -> None:
    """Refuse weights over depth of which connections were left out, so that sources and readers no longer match."""
    _order_of(values)
    if values.sizes["source"] != values.sizes["connection"] + 1:
        raise Unavailable(
            f"the run has {values.sizes['source']} sources and {values.sizes['connection']} connections; expected one "
            "source more than connections"
        )


def _carried_paths(
    depth_carry: xr.DataArray, branch_scale: xr.DataArray | None, mask: xr.DataArray
) -> SourcePaths:
    """Each branch reads the state that the connection before made: what that kept, and its own output."""
    _require_all_sources(depth_carry)
    kept = require_finite(real_tokens(depth_carry, mask), depth_carry)
    written = np.ones(kept.shape[:2]) if branch_scale is None else real_tokens(branch_scale, mask)
    weights = np.zeros_like(kept)
    weights[0, :, 0] = 1.0
    weights[1:] = kept[:-1]
    for number in range(1, len(weights)):
        weights[number, :, number] += written[number - 1]
    return SourcePaths(weights)


@quantity
def mean_depth_kernel(depth_paths: DepthPaths) -> np.ndarray:
    """Mean |M| over tokens, (C, C), a block of tokens at a time."""
    if isinstance(depth_paths, StreamPaths):
        depth_paths.require_finite()
    total = np.zeros((len(depth_paths), len(depth_paths)))
    block = max(1, BLOCK // depth_paths.numbers_a_token)
    for start in range(0, depth_paths.num_tokens, block):
        # Magnitudes before the sum: reads of opposite sign in two tokens do not cancel.
        with np.errstate(over="ignore"):
            total += depth_paths.kernels(slice(start, start + block)).sum(axis=0)
    if not np.isfinite(total).all():
        raise Unavailable("what connections read of each other grows beyond float64: see the composite gain")
    return total / depth_paths.num_tokens
