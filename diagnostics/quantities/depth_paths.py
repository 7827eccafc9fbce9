"""How does an output reach a later sublayer? The depth kernel M of every linear connection, whatever its parts are called.

    X_{k+1} = Σ_j A_kj X_j + B_k ⊗ F_k(Σ_j C_kj X_j)

M_kj says how much of source j sublayer k reads, at frozen coefficients. Shapes: ``C`` connections, ``N`` real tokens, ``n``
streams, ``V`` views (inputs or outputs of one branch, mostly one), ``D`` features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.quantities.mixing_matrices import (
    BLOCK,
    Mixing,
    over_tokens,
    real_tokens,
    require_finite,
)
from depthscope.diagnostics.quantities.registry import Unavailable, missing, quantity
from depthscope.diagnostics.schema import PROVEN, UNPROVEN


@dataclass(frozen=True)
class Order:
    """Which state each sublayer is applied to, and which one it reads; states are numbered from the embedding, 0."""

    applied_to: tuple[int, ...]  # (C,) each
    reads_from: tuple[int, ...]  # (C,) each

    @property
    def sequential(self) -> bool:
        """Whether each sublayer reads the state that it is applied to, one after the other."""
        return self.applied_to == self.reads_from == tuple(range(len(self.applied_to)))

    @property
    def cuts(self) -> tuple[int, ...]:
        """The connection before which each one's state is cut: between parallel branches there is no state."""
        return tuple(self.applied_to.index(state) for state in self.applied_to)


class DepthPaths(ABC):
    """The paths of one chain from each source to each reader.

    Parameters
    ----------
    count : int
        C.
    num_tokens : int
        N.
    """

    def __init__(self, count: int, num_tokens: int) -> None:
        self._count, self.num_tokens = count, num_tokens

    def __len__(self) -> int:
        return self._count

    @property
    @abstractmethod
    def numbers_a_token(self) -> int:
        """Numbers that the kernel of one token takes."""

    @abstractmethod
    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C): readers by sources, those of one branch's views as a root mean square."""

    @abstractmethod
    def embedding(self) -> np.ndarray:
        """|M_k0| of every token, (C, N): how much of the embedding each sublayer reads."""

    @abstractmethod
    def effective_streams(self, chosen: np.ndarray) -> np.ndarray:
        """Effective streams at the cut before each connection, (C, number of chosen tokens); NaN at the first."""

    def reduced(self, values: np.ndarray) -> xr.Variable:
        """Reduce values (C, N) of every token, with dims (connection, reduction)."""
        return xr.Variable(("connection", "reduction"), over_tokens(values))


class StreamPaths(DepthPaths):
    """Paths through streams: M_kj = H_pre,k (∏ H_res) H_postᵀ_j.

    Parameters
    ----------
    mixing : Mixing
        The matrices.
    reads, writes : ndarray
        (C, N, V, n) and (C, N, n, V).
    order : Order
        Of the connections.
    first : ndarray or None
        The streams of the embedding, (N, n, D); ones (N, n, 1) where they are copies of one another; None for unknown.
    """

    def __init__(
        self,
        mixing: Mixing,
        reads: np.ndarray,
        writes: np.ndarray,
        order: Order,
        first: np.ndarray | None,
    ) -> None:
        super().__init__(len(mixing), mixing.num_tokens)
        self.mixing, self.reads, self.writes, self.order = mixing, reads, writes, order
        self.first = first
        self.num_views = max(reads.shape[-2], writes.shape[-1])

    @property
    def numbers_a_token(self) -> int:
        """Numbers that the kernel of one token takes."""
        return (len(self) * self.num_views) ** 2

    def _plain(self) -> bool:
        """Whether there is one view of each branch, and each connection follows the one before."""
        return self.num_views == 1 and self.order.sequential

    def _by_view(self, part: slice | np.ndarray) -> np.ndarray:
        """M of some tokens, (N, C·V, C·V): each view as a branch of its own, parallel to the others."""
        views = self.num_views
        matrices = self.mixing.matrices[:, part]
        if self._plain():
            return kernel.depth_kernel(matrices, self.reads[:, :, 0][:, part], self.writes[..., 0][:, part])
        # Views that one side does not have read and write nothing.
        reads = np.zeros((len(self), views, *matrices.shape[1:3]))
        writes = np.zeros_like(reads)
        reads[:, : self.reads.shape[-2]] = np.moveaxis(self.reads[:, part], 2, 1)
        writes[:, : self.writes.shape[-1]] = np.moveaxis(self.writes[:, part], 3, 1)
        return kernel.depth_kernel(
            np.repeat(matrices, views, axis=0),
            reads.reshape(-1, *reads.shape[2:]),
            writes.reshape(-1, *writes.shape[2:]),
            applied_to=np.repeat(self.order.applied_to, views).tolist(),
            reads_from=np.repeat(self.order.reads_from, views).tolist(),
        )

    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C)."""
        found = self._by_view(part)
        if self.num_views == 1:
            return np.abs(found)
        views = found.reshape(len(found), len(self), self.num_views, len(self), self.num_views)
        # Of a source with uncorrelated views of size 1, the root mean square of an input: 1 for a plain chain whose features
        # are split into views, |M| for one view.
        return np.sqrt((views**2).sum(axis=(2, 4)) / self.reads.shape[-2])

    def embedding(self) -> np.ndarray:
        """|M_k0| of every token, (C, N)."""
        if self.first is None:
            raise Unavailable("the run has no state at the embedding")
        self.require_finite()
        applied, state = self.order.applied_to, self.first
        found = np.empty((len(self), self.num_tokens))
        with np.errstate(over="ignore", invalid="ignore"):
            for number, matrices in enumerate(self.mixing.matrices):
                # At the first sublayer of a state: parallel ones share its matrix, which is applied once.
                if number and applied[number] == applied[number - 1]:
                    continue
                for reader in np.flatnonzero(np.equal(self.order.reads_from, applied[number])):
                    read = np.einsum("tvi,tid->tvd", self.reads[reader], state)
                    found[reader] = np.sqrt((read**2).sum(axis=-1).mean(axis=-1))
                state = np.einsum("tij,tjd->tid", matrices, state)
            size = np.sqrt((self.first**2).sum(axis=-1).mean(axis=-1))
        if not np.isfinite(found).all():
            raise Unavailable(
                "what connections read of the embedding grows beyond float64: see the composite gain"
            )
        return found / np.where(size > 0, size, np.nan)

    def require_finite(self) -> None:
        """Refuse matrices that are not finite: everything after them would be unknown."""
        if not self.mixing.finite.all():
            raise Unavailable(f"h_res is not finite at connection {int(np.argmin(self.mixing.finite))}")

    def effective_streams(self, chosen: np.ndarray) -> np.ndarray:
        """Effective streams at the cut before each connection, (C, tokens)."""
        if not self._plain():
            cuts = _hankel_streams(self._by_view, chosen, len(self), self.num_views)
            return cuts[list(self.order.cuts)]
        cuts = np.full((len(self), len(chosen)), np.nan)
        # The kernel gives the cuts between connections: nothing passes before the first one.
        cuts[1:] = kernel.streams_across(
            self.mixing.matrices[:, chosen], self.reads[:, :, 0][:, chosen], self.writes[..., 0][:, chosen]
        ).T
        return cuts

    def reduced(self, values: np.ndarray) -> xr.Variable:
        """Reduce values (C, N) of every token; NaN where an earlier connection is not finite."""
        return self.mixing.reduced(values, depends_on="earlier")


class PlainPaths(DepthPaths):
    """Paths through one state: M_kj = a_{k−1} … a_{j+1} b_j, with factors of every token, or of every feature of it.

    Parameters
    ----------
    keeps, writes : ndarray
        a and b, (C, N) or (C, N, D).
    order : Order
        Of the connections.
    """

    def __init__(self, keeps: np.ndarray, writes: np.ndarray, order: Order) -> None:
        super().__init__(*keeps.shape[:2])
        self.keeps, self.writes, self.order = keeps, writes, order

    @property
    def numbers_a_token(self) -> int:
        """Numbers that the kernel of one token takes."""
        return len(self) ** 2 * int(np.prod(self.keeps.shape[2:]))

    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C)."""
        keeps, writes = self.keeps[:, part], self.writes[:, part]
        found = kernel.depth_kernel(
            keeps[..., None, None],
            np.ones_like(writes)[..., None],
            writes[..., None],
            applied_to=self.order.applied_to,
            reads_from=self.order.reads_from,
        )
        # Gates: each feature has its own product; their magnitudes are averaged after it.
        return np.abs(found) if found.ndim == 3 else np.abs(found).mean(axis=1)

    def embedding(self) -> np.ndarray:
        """|M_k0| of every token, (C, N)."""
        products = np.ones((max(self.order.applied_to) + 2, *self.keeps.shape[1:]))
        for number, state in enumerate(self.order.applied_to):
            products[state + 1] = products[state] * self.keeps[number]
        found = np.abs(products[list(self.order.reads_from)])
        return found if found.ndim == 2 else found.mean(axis=-1)

    def effective_streams(self, chosen: np.ndarray) -> np.ndarray:
        """Effective streams at the cut before each connection, (C, tokens)."""
        # One state passes on a single sum: the block at a cut has rank one, or zero where nothing is read across.
        across = self.kernels(chosen)
        passing = [across[:, cut:, :cut].any(axis=(1, 2)) for cut in self.order.cuts]
        return np.where(np.stack(passing), 1.0, np.nan)


class SourcePaths(DepthPaths):
    """Paths over depth, where every branch has its own weights on the sources: M is given.

    Parameters
    ----------
    weights : ndarray
        (C, N, C + 1), the first source is the embedding.
    """

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__(*weights.shape[:2])
        self.weights = weights

    @property
    def numbers_a_token(self) -> int:
        """Numbers that the kernel of one token takes."""
        return len(self) ** 2

    @cached_property
    def _kernels(self) -> np.ndarray:
        return np.moveaxis(self.weights[..., 1:], 0, 1)

    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C)."""
        return np.abs(self._kernels[part])

    def embedding(self) -> np.ndarray:
        """|M_k0| of every token, (C, N)."""
        return np.abs(self.weights[..., 0])

    def effective_streams(self, chosen: np.ndarray) -> np.ndarray:
        """Effective streams at the cut before each connection, (C, tokens)."""
        return _hankel_streams(self._kernels.__getitem__, chosen, len(self), 1)


# One decomposition a cut and token, of a matrix as large as the depth: fewer tokens where no product of small triangles
# gives it. Heuristic: the mean over 16 tokens is known to a quarter of their spread.
HANKEL_TOKENS = 16


def _hankel_streams(kernels: Any, chosen: np.ndarray, count: int, views: int) -> np.ndarray:
    """Effective streams by the singular values of the blocks M[k ≥ c, j < c], (C, tokens)."""
    few = chosen[:: max(1, len(chosen) // HANKEL_TOKENS)]
    cuts = np.full((count, len(few)), np.nan)
    # A cut between two connections leaves the views of each together.
    cuts[1:] = kernel.effective_streams(kernels(few))[..., views - 1 :: views].T
    return cuts


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
    residual: xr.DataArray | None = None,
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
        return StreamPaths(mixing, reads, writes, _order_of(h_res), _first_streams(residual, mask))
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


def _first_streams(residual: xr.DataArray | None, mask: xr.DataArray) -> np.ndarray | None:
    """The streams of the embedding (N, n, D), ones (N, n, 1) where they are copies; None where the run does not have them."""
    site = "" if residual is None or "site" not in residual.coords else str(residual.coords["site"].values[0])
    if residual is None or site != "embed":
        return None
    real = mask.transpose("sample", "token").values
    first = (
        residual.isel(depth=0).transpose("sample", "token", "stream", "feature").values[real].astype(float)
    )
    # Of copies only the weights matter, which are exact whatever the embedding is.
    return np.ones((*first.shape[:2], 1)) if bool((first == first[:, :1]).all()) else first


def _order_of(values: xr.DataArray) -> Order:
    """The order of the connections by their depths, those of a run by hand one after the other."""
    coords, count = values.coords, values.sizes["connection"]
    numbers = coords["connection"].values if "connection" in coords else np.arange(count)
    if (np.diff(numbers) != 1).any() or numbers[0] != 0:
        raise Unavailable(
            "some connections were left out by sites=, so that what passes them is unknown: capture all of them"
        )
    if "depth_in" not in coords or "depth_out" not in coords:
        return Order(tuple(range(count)), tuple(range(count)))
    ends = list(zip(coords["depth_in"].values.tolist(), coords["depth_out"].values.tolist(), strict=True))
    # Branches between the same two depths are parallel.
    applied = np.cumsum([number > 0 and ends[number] != ends[number - 1] for number in range(count)]).tolist()
    if "read_depth" not in coords:
        return Order(tuple(applied), tuple(applied))
    reads = []
    for number, depth in enumerate(coords["read_depth"].values.tolist()):
        # The state after all connections that write it or an earlier depth.
        written = [applied[other] + 1 for other in range(count) if ends[other][1] <= depth]
        state = max(written, default=0)
        if state > applied[number]:
            raise Unavailable(
                f"read_depth of connection {number} is {depth}; expected at most depth {ends[number][0]}, which it is "
                "applied to"
            )
        reads.append(state)
    return Order(tuple(applied), tuple(reads))


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
    each = (
        depth_in.coords["proof"].values.astype(object).astype(str)
        if "proof" in depth_in.coords
        else np.array([PROVEN])
    )
    if (each != PROVEN).any():
        number = int(np.argmax(each != PROVEN))
        raise Unavailable(f"connection {number} is {each[number]}")
    after = (
        depth_in.coords["after_sum"].values.astype(object).astype(str)
        if "after_sum" in depth_in.coords
        else np.array([""])
    )
    if (after != "").any() and not after_sum_is_known:
        number = int(np.argmax(after != ""))
        raise Unavailable(
            f"the state after connection {number} is a {after[number]} of the sum, whose factor the run does not have"
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
