"""Are the matrices of a connection made by Sinkhorn's iteration? Then their rows and columns are normalised in turn."""

from __future__ import annotations

from collections.abc import Iterable

from depthscope.probes.reading.graph import TracedValue, names

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
