"""Connections whose weights are local variables: read from the operations between two states, whatever code they are in.

At frozen weights the next state is linear in the state before and in the branch's output. Both operators are read by running
the recorded operations once more: on states that are one in a single stream and zero elsewhere (H_res and H_pre), and on a
branch output of ones (H_post). Shapes: B batch, T token, N stream, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.family import Family, StreamConnectionError
from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value
from depthscope.probes.model.layout import canonical, from_canonical, parse_layout

# Weights that differ by more than this between features are no scalars: a few roundings of bfloat16, in which they may have
# been applied; heuristic.
EQUAL = 2e-2


@dataclass(frozen=True)
class TracedConnection:
    """The values around one connection.

    Parameters
    ----------
    before, after : Value
        The states, with streams.
    branch_in : Value or None
        What the branch takes; None where no module shows it.
    branch_out : Value
        What the branch gives, as wide as one stream.
    """

    before: Value
    after: Value
    branch_in: Value | None
    branch_out: Value


def find_traced(
    trace: Trace, before: Value, after: Value, shown: Mapping[int, Value], num_streams: int
) -> TracedConnection:
    """The branch between two states.

    ``shown``: values that some module took or returned, by their numbers.
    Raises StreamConnectionError: Where the next state is no sum of mixed streams and one branch.
    """
    width = math.prod(before.shape) // num_streams
    found = LinearDependence(after, [before])
    outputs = {
        id(output): output
        for source in found.sources
        if trace.depends(source, before)
        for output in _branch_outputs(trace, source, before, width)
    }
    if len(outputs) != 1:
        raise StreamConnectionError(
            f"{len(outputs)} branches of the width of a stream are written between two states; one is expected"
        )
    (branch_out,) = outputs.values()
    inputs = [
        value
        for number, value in sorted(shown.items())
        if before.number < number < branch_out.number
        and math.prod(value.shape) == width
        and _axes_within(value, before)
        and trace.depends(branch_out, value)
        and LinearDependence(value, [before]).reached
    ]
    return TracedConnection(before, after, inputs[0] if inputs else None, branch_out)


def _branch_outputs(trace: Trace, source: Value, before: Value, width: int) -> Iterator[Value]:
    """What is written, without the weights that it is written with: the values of a stream's width that lead to a source."""
    waiting, seen = [source], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not trace.depends(value, before):
            continue
        seen.add(id(value))
        if math.prod(value.shape) == width and _axes_within(value, before):
            yield value
        elif value.step is not None and not value.step.rule.function:
            waiting += value.step.operands


def _axes_within(value: Value, state: Value) -> bool:
    """Whether a value of the width of one stream has the axes of the state: it was added to it, token by token."""
    own = {id(atom.itself()) for axis in state.axes for atom in axis}
    return all(id(atom.itself()) in own for axis in value.axes for atom in axis)


def read_traced(connection: TracedConnection, layout: str, batch_size: int, num_streams: int) -> Parts:
    """The weights of a connection at every token.

    Returns: With an empty branch input: what the branch takes is H_pre X, which the caller has the states for.
    """
    before, after = connection.before, connection.after

    def streams(tensor: torch.Tensor) -> torch.Tensor:
        return canonical(tensor, layout, batch_size=batch_size, num_streams=num_streams)

    branch_layout = _branch_layout(connection.branch_in, before, layout)
    carried = LinearDependence(after, [before])
    read = None if connection.branch_in is None else LinearDependence(connection.branch_in, [before])
    columns, reads = [], []
    for stream in range(num_streams):
        probe = _one_stream(before, layout, batch_size, num_streams, stream)
        moved = carried.apply({before.number: probe})
        tokens = streams(
            torch.zeros((), device=before.device).expand(before.shape) if moved is None else moved
        )
        columns.append(_scalar(tokens, "H_res"))
        if read is not None:
            taken = read.apply({before.number: probe})
            if taken is None:
                taken = torch.zeros((), device=before.device).expand(connection.branch_in.shape)  # type: ignore[union-attr]
            taken = canonical(taken.squeeze(), branch_layout, batch_size=batch_size, num_streams=1)
            reads.append(_scalar(taken.squeeze(2), "H_pre"))
    written_once = connection.branch_out
    ones = torch.ones(written_once.shape, dtype=written_once.dtype, device=written_once.device)
    written = LinearDependence(after, [before, connection.branch_out]).apply(
        {connection.branch_out.number: ones}
    )
    if written is None:
        raise StreamConnectionError("the branch's output does not reach the next state linearly")
    write = _scalar(streams(written), "H_post").unsqueeze(-1)
    mix = torch.stack(columns, -1).float()
    empty = torch.empty((*mix.shape[:2], 1, 0), device=mix.device)
    return Parts(mix, torch.stack(reads, -1).unsqueeze(-2).float() if reads else None, write.float(), empty)


def _branch_layout(branch_in: Value | None, state: Value, layout: str) -> str:
    """The layout of what a branch takes, without axes of size 1, by the axes that it shares with the state."""
    letters = {
        id(atom.itself()): letter
        for axis, group in zip(state.axes, parse_layout(layout), strict=True)
        for atom, letter in zip(axis, group, strict=False)
    }
    axes = () if branch_in is None else branch_in.axes
    named = [[letters[id(atom.itself())] for atom in axis] for axis in axes if axis]
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in named)


def _one_stream(value: Value, layout: str, batch_size: int, num_streams: int, stream: int) -> torch.Tensor:
    """A state that is one in a stream, and zero in the others."""
    like = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    ones = torch.zeros_like(canonical(like, layout, batch_size=batch_size, num_streams=num_streams))
    ones[:, :, stream] = 1
    return from_canonical(ones, layout, value.shape, batch_size=batch_size, num_streams=num_streams)


def _scalar(weights: torch.Tensor, name: str) -> torch.Tensor:
    """Weights (…, D) as one number for all features."""
    first = weights[..., :1]
    if float((weights - first).abs().max()) > EQUAL * max(float(weights.abs().max()), 1.0):
        raise StreamConnectionError(
            f"{name} differs between the features of a stream: it is no matrix over streams"
        )
    return first.squeeze(-1)


FAMILY = Family(name="traced", constrains={"hc": ""})
