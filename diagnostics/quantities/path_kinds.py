"""How much of each source does a sublayer read, and in how many streams? By the kind of connection, on bare arrays.

    X_{k+1} = Σ_j A_kj X_j + B_k ⊗ F_k(Σ_j C_kj X_j)

M_kj is how much of source j sublayer k reads, at frozen coefficients. Shapes: ``C`` connections, ``N`` real tokens, ``n``
streams, ``V`` views (inputs or outputs of one branch, mostly one), ``D`` features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.quantities.mixing_matrices import Mixing, over_tokens
from depthscope.diagnostics.quantities.registry import Unavailable


@dataclass(frozen=True)
class Order:
    """Which state each sublayer reads and is applied to; states are numbered from the embedding, 0."""

    applied_to: tuple[int, ...]  # (C,)

    @property
    def cuts(self) -> tuple[int, ...]:
        """The connection before which each one's state is cut: between parallel branches there is no state."""
        return tuple(self.applied_to.index(state) for state in self.applied_to)


class DepthPaths(ABC):
    """The paths of one chain from each source to each reader.

    ``count``: C.
    ``num_tokens``: N.
    ``numbers_a_token``: that the kernel of one token takes.
    """

    def __init__(self, count: int, num_tokens: int, numbers_a_token: int) -> None:
        self._count, self.num_tokens, self.numbers_a_token = count, num_tokens, numbers_a_token

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C): readers by sources, those of one branch's views as a root mean square."""

    @abstractmethod
    def effective_streams(self, chosen: np.ndarray) -> np.ndarray:
        """Effective streams at the cut before each connection, (C, number of chosen tokens); NaN at the first."""

    def reduced(self, values: np.ndarray) -> xr.Variable:
        """Reduce values (C, N) of every token, with dims (connection, reduction)."""
        return xr.Variable(("connection", "reduction"), over_tokens(values))


class StreamPaths(DepthPaths):
    """Paths through streams: M_kj = H_pre,k (∏ H_res) H_postᵀ_j.

    ``mixing``: the matrices.
    ``reads, writes``: (C, N, V, n) and (C, N, n, V).
    ``order``: of the connections.
    """

    def __init__(self, mixing: Mixing, reads: np.ndarray, writes: np.ndarray, order: Order) -> None:
        self.num_views = max(reads.shape[-2], writes.shape[-1])
        super().__init__(len(mixing), mixing.num_tokens, (len(mixing) * self.num_views) ** 2)
        self.mixing, self.reads, self.writes, self.order = mixing, reads, writes, order

    def _plain(self) -> bool:
        """Whether there is one view of each branch, and each connection follows the one before."""
        return self.num_views == 1 and self.order.applied_to == tuple(range(len(self)))

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

    ``keeps, writes``: a and b, (C, N) or (C, N, D).
    ``order``: of the connections.
    """

    def __init__(self, keeps: np.ndarray, writes: np.ndarray, order: Order) -> None:
        super().__init__(keeps.shape[0], keeps.shape[1], len(keeps) ** 2 * int(np.prod(keeps.shape[2:])))
        self.keeps, self.writes, self.order = keeps, writes, order

    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C)."""
        keeps, writes = self.keeps[:, part], self.writes[:, part]
        found = kernel.depth_kernel(
            keeps[..., None, None],
            np.ones_like(writes)[..., None],
            writes[..., None],
            applied_to=self.order.applied_to,
        )
        # Gates: each feature has its own product; their magnitudes are averaged after it.
        return np.abs(found) if found.ndim == 3 else np.abs(found).mean(axis=1)

    def effective_streams(self, chosen: np.ndarray) -> np.ndarray:
        """Effective streams at the cut before each connection, (C, tokens)."""
        # One state passes on a single sum: the block at a cut has rank one, or zero where nothing is read across.
        across = self.kernels(chosen)
        passing = [across[:, cut:, :cut].any(axis=(1, 2)) for cut in self.order.cuts]
        return np.where(np.stack(passing), 1.0, np.nan)


class SourcePaths(DepthPaths):
    """Paths over depth, where every branch has its own weights on the sources: M is given.

    ``weights``: (C, N, C + 1), the first source is the embedding.
    """

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__(weights.shape[0], weights.shape[1], len(weights) ** 2)
        self._kernels = np.moveaxis(weights[..., 1:], 0, 1)

    def kernels(self, part: slice | np.ndarray) -> np.ndarray:
        """|M| of some tokens, (N, C, C)."""
        return np.abs(self._kernels[part])

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
