"""How many dimensions do neighbours show, and without each sequence? One pass over all distances for a value and its error.

Shapes: ``N`` distinct tokens, ``D`` features, ``G`` owners: the sequences, and -1 for what occurs in several.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import geometry
from depthscope.diagnostics.quantities.over_sequences import DEGREES, ONE_SEQUENCE
from depthscope.diagnostics.quantities.registry import quantity, with_attrs
from depthscope.diagnostics.quantities.states import States, by_kind

# Entries of one block of rows of the distance matrix: 32 MB of float64.
BLOCK = 4_000_000
# Candidates of each owner whose distances are computed from differences: a Gram matrix loses the order of close ones.
CANDIDATES = 4
SHARED = -1


class Neighbours(NamedTuple):
    """The dimension of a cloud, without each sequence in turn, and how many distinct tokens it is from."""

    dimension: float
    without: np.ndarray
    num_tokens: int


def neighbour_dimension(points: np.ndarray, sequence: np.ndarray) -> Neighbours:
    """TwoNN of all tokens, and of those of all sequences but one.

    A token that occurs in several sequences stays when one of them is left out: the result is that of computing anew.

    Returns: NaN where too few distinct tokens are left, see `depthscope.kernels.geometry.two_nn`.
    """
    distinct, inverse = np.unique(np.asarray(points, dtype=np.float64), axis=0, return_inverse=True)
    inverse = inverse.ravel()
    sequences = np.unique(sequence)
    least, most = np.full(len(distinct), len(sequences)), np.full(len(distinct), -1)
    place = np.searchsorted(sequences, sequence)
    np.minimum.at(least, inverse, place)
    np.maximum.at(most, inverse, place)
    owner = np.where(least == most, least, SHARED)
    centred = distinct - distinct.mean(axis=0) if len(distinct) else distinct
    owners = [SHARED, *range(len(sequences))]
    nearest = _nearest_by_owner(centred, owner, owners)

    def dimension(keep: np.ndarray, of_owners: list[int]) -> float:
        if keep.sum() < 3:
            return float("nan")
        pairs = np.sort(nearest[keep][:, of_owners].reshape(int(keep.sum()), -1), axis=1)[:, :2]
        return float(geometry.two_nn_of(pairs[:, 0], pairs[:, 1]))

    everything = dimension(np.ones(len(distinct), bool), list(range(len(owners))))
    without = [
        dimension(owner != left_out, [at for at, each in enumerate(owners) if each != left_out])
        for left_out in range(len(sequences))
    ]
    return Neighbours(everything, np.array(without), len(distinct))


def _nearest_by_owner(points: np.ndarray, owner: np.ndarray, owners: list[int]) -> np.ndarray:
    """Distances (N, G, 2) of every point to the nearest two others of each owner; ∞ where there are fewer."""
    square = (points**2).sum(axis=1)
    found = np.full((len(points), len(owners), 2), np.inf)
    rows = max(1, BLOCK // max(len(points), 1))
    columns = {at: np.flatnonzero(owner == each) for at, each in enumerate(owners)}
    for start in range(0, len(points), rows):
        part = np.arange(start, min(start + rows, len(points)))
        gram = square[part, None] + square - 2.0 * (points[part] @ points.T)
        gram[np.arange(len(part)), part] = np.inf  # the point itself
        for at, of_owner in columns.items():
            if not len(of_owner):
                continue
            wanted = min(CANDIDATES, len(of_owner))
            close = np.argpartition(gram[:, of_owner], wanted - 1, axis=1)[:, :wanted]
            others = of_owner[close]
            exact = np.linalg.norm(points[others] - points[part][:, None], axis=-1)
            exact[others == part[:, None]] = np.inf
            exact = np.sort(exact, axis=1)[:, :2]
            found[part, at, : exact.shape[1]] = exact
    return found


@quantity
def neighbour_dimensions(
    residual_states: States, token_masks: xr.Variable
) -> tuple[xr.Variable, xr.Variable, xr.Variable]:
    """Dimension of the cloud of tokens, its jackknife error over sequences, and the number of distinct tokens."""
    sequences = np.broadcast_to(np.arange(len(residual_states.mask))[:, None], residual_states.mask.shape)

    def measure(views: np.ndarray) -> np.ndarray:
        def of_kind(counted: np.ndarray) -> np.ndarray:
            return np.array([_with_error(view[counted], sequences[counted]) for view in views])

        return np.stack(by_kind(token_masks.values, of_kind), axis=1)

    found = residual_states.over_depth(measure, ("tokens", "part"))
    dimension, error, count = (found.isel(part=at).transpose("tokens", "depth", "stream") for at in range(3))
    num_sequences = int(residual_states.mask.any(axis=1).sum())
    facts = {
        "estimator": f"delete-one jackknife over {num_sequences} sequences",
        **({DEGREES: num_sequences - 1} if num_sequences > 1 else {"undefined_because": ONE_SEQUENCE}),
    }
    return dimension, with_attrs(error, facts), count


def _with_error(points: np.ndarray, sequence: np.ndarray) -> tuple[float, float, float]:
    found = neighbour_dimension(points, sequence)
    replicas = found.without
    if len(replicas) < 2:
        return found.dimension, float("nan"), float(found.num_tokens)
    squares = ((replicas - replicas.mean()) ** 2).sum()
    return (
        found.dimension,
        float(np.sqrt(squares * (len(replicas) - 1) / len(replicas))),
        float(found.num_tokens),
    )
