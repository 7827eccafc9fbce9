"""What is known of one connection, and of the product of a chain of them, from weight files alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.kernels import rank

ROUNDED = 1e-6  # largest error of a sum of weights that were stored in float32 at most
COLLAPSED = 0.01  # share of the differences between streams below which they count as one; a heuristic


@dataclass(frozen=True)
class Unrecognised:
    """A tensor that looks like a connection's and that no row of the dialects explains."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class DepthRead:
    """What weights alone tell of an attention over depth: softmax over sources of q · norm(source).

    ``sources``: how many it reads: the embedding, the sums of finished blocks, and the unfinished one. 0 for a query
    that is not applied.
    ``block``: layers that are summed to one source.
    ``resets``: whether a block ends here: the state that goes on begins anew with this layer's attention.
    ``query_norms``: ‖q‖ of each query; 0 weighs all sources equally.
    """

    sources: int
    block: int
    resets: bool
    query_norms: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class MatrixFacts:
    """A static mixing matrix in numbers; distances are Frobenius norms over √n."""

    singular_values: np.ndarray
    spectral_gap: float
    row_sums: np.ndarray
    column_sums: np.ndarray
    off_diagonal: float
    identity_distance: float
    uniform_distance: float


@dataclass(frozen=True, eq=False)
class StaticConnection:
    """A connection at an input that adds nothing; rows of ``h_res`` are destinations. None: the files do not determine it.

    ``dtypes``: of its tensors.
    ``sinkhorn``: how ``logits`` become H_res.
    ``h_pre``: the read that is applied here; with ``read_lag`` 1 the sub-block before made it; None where unknown.
    ``constraint``: what H_res satisfies, as measured.
    """

    module: str
    chain: str
    layer: int
    branch: str
    family: str
    style: str
    streams: int
    width: int | None
    constrained: bool
    learns_mixing: bool
    dtypes: tuple[str, ...]
    gates: dict[str, float]
    h_res: np.ndarray | None
    h_pre: np.ndarray | None
    h_post: np.ndarray | None
    logits: np.ndarray | None
    sinkhorn: dict[str, Any]
    mixing: MatrixFacts | None
    note: str
    dialect: str
    read_lag: int | None
    depth: DepthRead | None
    constraint: str = ""


@dataclass(frozen=True, eq=False)
class StaticComposite:
    """The product of the static matrices of a chain, first to last."""

    chain: str
    connections: int
    streams: int
    forward_gain: float
    backward_gain: float
    singular_values: np.ndarray
    effective_rank: float
    effective_streams: float | None
    collapsed_after: int | None


def matrix_facts(h_res: np.ndarray) -> MatrixFacts:
    """A mixing matrix, destination by source, in numbers."""
    n = len(h_res)
    # By sizes: with signed weights the sums could cancel, and the share be anything.
    size = np.abs(h_res)
    return MatrixFacts(
        singular_values=kernel.singular_values(h_res),
        spectral_gap=float(kernel.spectral_gap(h_res)),
        row_sums=h_res.sum(axis=1),
        column_sums=h_res.sum(axis=0),
        off_diagonal=float(1.0 - np.trace(size) / size.sum()) if size.any() else math.nan,
        identity_distance=float(kernel.identity_distance(h_res)),
        uniform_distance=float(np.linalg.norm(h_res - 1.0 / n) / math.sqrt(n)),
    )


def by_stem(found: Iterable[Unrecognised]) -> dict[str, list[Unrecognised]]:
    """Unrecognised tensors together that differ in the numbers of their names alone, as layers do."""
    groups: dict[str, list[Unrecognised]] = defaultdict(list)
    for one in found:
        groups[f"{re.sub(r'[0-9]+', '*', one.name)} {one.shape} {one.reason}"].append(one)
    return groups


def constraint_of(matrices: Sequence[np.ndarray], floor: float = 0.0) -> str:
    """What mixing matrices of as many streams satisfy, as measured.

    ``floor``: what Sinkhorn adds to every sum, which keeps the sums from being exact.
    Returns: Empty without matrices of two or more streams.
    """
    if not matrices or len(matrices[0]) < 2:
        return ""
    # Each of n sums has the floor in it, in two rounds.
    tolerance = max(ROUNDED, 4 * len(matrices[0]) * floor)
    return kernel.named_constraint(np.stack(matrices), tolerance=tolerance).words


# --- products over depth


def composites(
    connections: Sequence[StaticConnection], broken: Collection[str] = ()
) -> list[StaticComposite]:
    """One product for each chain and number of streams in which every matrix is known.

    ``broken``: chains with tensors that look like a connection and were not recognised: a product would leave it out.
    """
    chains: dict[tuple[str, int], list[StaticConnection]] = defaultdict(list)
    for connection in connections:
        # Matrices of an encoder and a decoder, or of other sizes, do not multiply.
        chains[connection.chain, connection.streams].append(connection)
    return [
        _composite(chain, members)
        for (chain, _), members in chains.items()
        if chain not in broken
        if all(member.h_res is not None for member in members)
    ]


def _composite(chain: str, members: Sequence[StaticConnection]) -> StaticComposite:
    h_res = np.stack([member.h_res for member in members if member.h_res is not None])
    # scaled to avoid overflow: free matrices of a deep model multiply beyond float64
    product, log_scale = kernel.composite(h_res, return_log_scale=True)
    with np.errstate(over="ignore"):  # a gain beyond float64 is shown as infinite
        forward = np.exp(kernel.log_forward_gain(product, log_scale))
        backward = np.exp(kernel.log_backward_gain(product, log_scale))
        singular_values = kernel.singular_values(product) * np.exp(log_scale)
    return StaticComposite(
        chain=chain,
        connections=len(members),
        streams=h_res.shape[-1],
        forward_gain=float(forward),
        backward_gain=float(backward),
        singular_values=singular_values,
        # Of the scaled product: a rank does not depend on the scale, which may be infinite here.
        effective_rank=float(rank.effective_rank_of(kernel.singular_values(product))),
        effective_streams=_effective_streams(h_res, members),
        # Doubly stochastic matrices keep the mean of the streams and enlarge no difference, so a collapse lasts; after free
        # ones differences may grow again.
        collapsed_after=_collapsed_after(h_res) if all(member.constrained for member in members) else None,
    )


def _effective_streams(h_res: np.ndarray, members: Sequence[StaticConnection]) -> float | None:
    """Effective streams at the narrowest cut between two connections; None where reads or writes are unknown."""
    reads = [member.h_pre for member in members if member.h_pre is not None]
    writes = [member.h_post for member in members if member.h_post is not None]
    # where it is open which sub-block applies a read, so is the kernel
    if any(member.read_lag is None for member in members):
        return None
    if len(members) < 2 or len(reads) < len(members) or len(writes) < len(members):
        return None
    weights = kernel.depth_kernel(h_res, np.stack(reads), np.stack(writes))
    if not np.isfinite(weights).all():  # free matrices can amplify beyond float64
        return None
    cuts = kernel.effective_streams(weights)
    return None if np.isnan(cuts).all() else float(np.nanmin(cuts))


def _collapsed_after(h_res: np.ndarray) -> int | None:
    """The number of connections after which less than `COLLAPSED` of the differences between streams is left."""
    below = kernel.deflated_gain(h_res) < math.log(COLLAPSED)
    return int(np.argmax(below)) + 1 if below.any() else None
