"""Which call normalises the last state of a chain? By what the trace shows of it, whatever its class is called."""

from __future__ import annotations

import math
from collections.abc import Sequence

from depthscope.probes.dataflow.axes import same_axes
from depthscope.probes.dataflow.operations import NORMS
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value, carrier_of
from depthscope.probes.structure.chain import NO_FINAL_NORM, Chain
from depthscope.probes.structure.plain_proof import states_of
from depthscope.probes.structure.tape import Call, Tape, is_norm, same_values

# Operations that give the size of what a norm divides by, or its inverse.
SIZES = frozenset(("rsqrt", "sqrt", "pow", "reciprocal", "linalg_vector_norm", "norm", "std", "std_mean"))


def final_norm(tape: Tape, chain: Chain, streams: int = 1) -> tuple[Call | None, str]:
    """The call that normalises a chain's last state, or what its streams are collapsed to; or None, and why there is none.

    ``streams`` is their number where no connection on the tape tells it.
    """
    point = chain.points[-1]
    end = tape.by_key()[point.path, point.method, point.index]
    (state,) = states_of(tape, chain.points[-1:])
    sites = [call.site for call in tape.connection_calls() if call.site is not None]
    # Streams are collapsed to one before the norm; fractions of a stream are not.
    collapsed = sites[0].num_streams // sites[0].fractions if sites else streams
    later = [call for call in tape.calls if call.order > end.order and not call.inside(end)]
    for call in later:
        if call.y is not None and math.prod(call.y_shape) * collapsed == math.prod(chain.shapes[-1]):
            named = is_norm(call.module) and call.x_shape == call.y_shape
            taken = collapsed > 1 or same_values(call.x, end.value) or same_values(call.x, end.x)
            if (named and taken) or _normalises(tape.trace, call, state, collapsed):
                return call, ""
    return None, NO_FINAL_NORM if state is None or tape.trace is None else _where(tape.trace, later, state)


def _normalises(trace: Trace | None, call: Call, state: Value | None, collapsed: int) -> bool:
    """Whether a call takes the state as it is, and gives a norm of it along the same axes."""
    x, y = call.values
    if trace is None or state is None or x is None or y is None:
        return False
    if collapsed == 1 and not (y.shape == state.shape and same_axes(y.axes, state.axes)):
        return False
    # With something added, such as a last branch, it is another state that is normalised.
    taken = _norms_on_the_way(trace, x, state, sums=collapsed > 1)
    return taken == {False} and _norms_on_the_way(trace, y, state) == {True}


def _norms_on_the_way(trace: Trace, value: Value, state: Value, *, sums: bool = True) -> set[bool]:
    """Whether a norm lies on each linear way from a value back to a state; empty where there is no way."""
    found: set[bool] = set()
    waiting, seen = [(value, False)], {(value.number, False)}
    while waiting:
        current, normed = waiting.pop()
        if current is state:
            found.add(normed)
            continue
        if current.number < state.number or (_is_sum(current) and not sums):
            continue
        before, norm = _operands(trace, current, state)
        for operand in before:
            following = operand, normed or norm
            if (operand.number, following[1]) not in seen:
                seen.add((operand.number, following[1]))
                waiting.append(following)
    return found


def _is_sum(value: Value) -> bool:
    return value.step is not None and value.step.rule.sums


def _operands(trace: Trace, value: Value, state: Value) -> tuple[Sequence[Value], bool]:
    """From what a value was made linearly or by a norm, and whether that is a norm, such as a quotient by the state's size."""
    step = value.step
    if step is None:
        return (), False
    if step.rule.function:
        norm = step.name in NORMS
        return (step.operands[:1] if norm else ()), norm
    if step.rule.product and len(step.operands) == 2:
        carrier = carrier_of(step)
        (other,) = [operand for operand in step.operands if operand is not carrier] or [carrier]
        return (carrier,), _is_size(other) and trace.depends(other, state)
    return step.operands, False


def _is_size(value: Value) -> bool:
    """Whether a value is a root or a norm, apart from what is added to it, as what a norm divides by is."""
    while value.step is not None and len(value.step.operands) == 1:
        (value,) = value.step.operands
    return value.func is not None and str(value.func).split(".")[1] in SIZES


def _where(trace: Trace, later: Sequence[Call], state: Value) -> str:
    """Why no module gives the normalised state, in the words of the list of sites."""
    for call in later:
        for value in call.values:
            if value is not None and True in _norms_on_the_way(trace, value, state):
                return (
                    f"a norm takes the last state before the end of {call.path or 'the model'}, and no module returns "
                    "what it gives for every token"
                )
    return NO_FINAL_NORM
