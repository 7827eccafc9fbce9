"""What do the mixing matrices of a model satisfy, and does Sinkhorn's iteration make them? The name that follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from depthscope.diagnostics.kernels.mixing import Constraint, named_constraint
from depthscope.probes.connections.proof import Evidence
from depthscope.probes.reading.graph import TracedValue, names

# Up to which error a sum counts as 1, by the precision in which the model computes: some roundings of its last digit.
# Connections compute their weights in float32 where the states are float64.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}

MEASURED = frozenset({"hc", "mhc", "streams"})
"""Names of families that are told apart by measurement alone."""

NOTHING_MIXES = "identity: nothing mixes"
"""The constraint of connections that have no matrix."""


def measured_constraint(
    matrices: Sequence[torch.Tensor], precision: torch.dtype = torch.float32
) -> Constraint | None:
    """The most specific constraint that all matrices of a model satisfy.

    ``matrices``: one item a connection: (…, n, n), rows are destinations, of real tokens only, as the module computed
    them.
    Returns: None where there are no matrices, none that is finite, or a single stream.
    """
    flat = [
        matrix.detach().flatten(0, -3) if matrix.ndim > 2 else matrix.detach()[None] for matrix in matrices
    ]
    if not flat or flat[0].shape[-1] < 2:
        return None
    together = torch.cat([matrix.to("cpu", torch.float64) for matrix in flat])
    finite = together[together.isfinite().all(-1).all(-1)]
    if not len(finite):
        return None
    return named_constraint(finite.numpy(), tolerance=TOLERANCE.get(precision, TOLERANCE[torch.float32]))


def constraint_of(evidence: Evidence) -> Constraint | None:
    """The constraint of the proven connections of a run; see `measured_constraint`.

    Returns: None where no connection has a matrix.
    """
    joints = evidence.joints
    if all(joint.parts.mix is None for joint in joints):
        return None
    return measured_constraint([joint.matrix[joint.mask] for joint in joints], joints[0].dtype)


def constraint_words(evidence: Evidence, constraint: Constraint | None) -> str:
    """What a run's attribute says about its matrices; empty without stream connections."""
    if constraint is None:
        unmixed = evidence.joints and all(joint.parts.mix is None for joint in evidence.joints)
        return NOTHING_MIXES if unmixed else ""
    return constraint.words


def measured_family(detected: str, constraint: Constraint | None) -> str:
    """The family's name by how its matrices are made or by what they satisfy, not by what its code is called.

    ``detected``: ``"hc"`` for connections whose operations do not show how their matrices are constrained; other names stay.
    Returns: ``"mhc"`` where all matrices are doubly stochastic at weights that are not trivial, ``"hc"`` where they are
    not, and ``"streams"`` where they are those of an initialisation, at which every family is the same.
    """
    if detected != "hc" or constraint is None:
        return detected
    if constraint.trivial:
        return "streams"
    return "mhc" if constraint.name == "doubly stochastic" else "hc"


NORMALISING = names("sum mean logsumexp _softmax _log_softmax")
LEAST_IN_TURN = 4  # two rounds: a softmax along each axis once is no iteration


def times_in_turn(values: Iterable[TracedValue], num_streams: int) -> int:
    """How often rows and columns of n × n matrices are summed over in turn, on the longest way through some operations.

    ``values``: in the order in which they were made.
    """
    found: dict[int, tuple[int, int]] = {}  # by value: how often, and along which axis last
    for value in values:
        times, last = max((found.get(parent.number, (0, 0)) for parent in value.parents), default=(0, 0))
        axis = _axis(value, num_streams)
        found[value.number] = (times, last) if axis in (0, last) else (times + 1, axis)
    return max((times for times, _ in found.values()), default=0)


def _axis(value: TracedValue, num_streams: int) -> int:
    """Along which of the two axes of a matrix a value is summed over: -1 or -2; 0 where it is not."""
    if value.name not in NORMALISING or len(value.args) < 2 or not value.parents:
        return 0
    shape, dims = value.parents[0].shape, value.args[1]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if shape[-2:] != (num_streams, num_streams) or len(dims) != 1:
        return 0
    axis = dims[0] - len(shape) if dims[0] >= 0 else dims[0]
    return axis if axis in (-1, -2) else 0
