"""Is the next state the state before plus what was computed from it? «Plain» is proven in the trace of the first forward.

A chain is plain where X_{k+1} = g(a X_k + b F_k): F_k is computed from X_k, a scales it (1 in most models), and g is a norm or
an activation of the sum as a whole (nothing in most models, a norm in post-norm ones, a ReLU in ResNets).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from depthscope.probes.dataflow.axes import same_axes
from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value
from depthscope.probes.structure.chain import Chain, HookPoint
from depthscope.probes.structure.tape import Tape

# Norms and activations one after another that a state may pass through between two depths; a heuristic of ours. A block of
# BERT has two norms.
MOST_FUNCTIONS = 8

PROVEN = "proven"
CANCELLED = "the state before is cancelled out of the next one"
NO_STEP = "every block changes the shape of the state, so none is a sum with the state before"


def plain_step(trace: Trace, before: Value, after: Value, earlier: Sequence[Value] = ()) -> str:
    """Why the next state is no plain step from the one before; empty where it is one."""
    if before is after:
        return "the state is one and the same value before and after: no block changes it"
    if not trace.depends(after, before):
        return "the next state is not computed from the one before"
    path = plain_path(before, after)
    if path is None:
        return "the state is not carried on: the next one is computed from it by operations that are no sum with it"
    maps, functions, scale = path
    if not same_axes(before.axes, after.axes) or any(of.mixes for of in maps):
        return "the axes of the state are rearranged or mixed on the way to the next one"
    if scale == 0.0:
        return CANCELLED
    sources = [source for of in maps for source in of.sources if source not in functions]
    # By what is added, not by what scales it: the weights of another stream may be computed from this one.
    new = [source for source in sources if trace.depends(source.root, before)]
    # What comes from elsewhere, such as a position or a time, may be added; what earlier states gave is a connection over
    # depth, or another stream.
    if any(source not in new and _from_states(trace, source, before, earlier) for source in sources):
        return "something that earlier depths gave is added, not only what was computed from the state"
    return ""


def _from_states(trace: Trace, source: Value, before: Value, earlier: Sequence[Value]) -> bool:
    """Whether a term that is not computed from a state comes from the states before it, or is a part of one of them."""
    if source.root == before.number or trace.depends(source.root, before):
        return False
    return any(trace.depends(source.root, state) for state in earlier) or (
        bool(earlier) and trace.depends(before, source.root)
    )


def plain_path(
    before: Value, after: Value
) -> tuple[list[LinearDependence], list[Value], float | None] | None:
    """Linear maps from the next state back to the one before, the functions between them, and the scale; depth first."""
    waiting: list[tuple[list[LinearDependence], list[Value]]] = [([LinearDependence(after, [before])], [])]
    while waiting:
        maps, functions = waiting.pop()
        if maps[-1].reached:
            return maps, functions, maps[-1].scales[before.number]
        for function in maps[-1].functions if len(functions) < MOST_FUNCTIONS else ():
            assert function.step is not None
            operand = function.step.operands[0]
            # Only the state as a whole goes through: of another shape it is a branch. An earlier value cannot come from it.
            if function.shape != after.shape or operand.number < before.number:
                continue
            if operand is before:
                return maps, [*functions, function], 1.0
            waiting.append(([*maps, LinearDependence(operand, [before])], [*functions, function]))
    return None


def plain_steps(trace: Trace, states: Sequence[Value | None]) -> Iterator[tuple[int, str]]:
    """The steps between states, with the number of the state before.

    ``states``: in depth order; None where a state was not seen in the trace.
    """
    for depth, (before, after) in enumerate(pairwise(states)):
        if before is None or after is None:
            yield depth, "the trace of the forward did not see the state"
        elif before.shape == after.shape:
            known = [state for state in states[:depth] if state is not None]
            yield depth, plain_step(trace, before, after, known)
        # Another shape begins a stage: what makes it is no sum with the state, and no claim is made about it.


def with_proof(tape: Tape, chain: Chain) -> Chain:
    """A plain chain with its proof; one with connections of another kind as it came, since these have a proof of their own.

    ``tape``: the calls of the first forward, with its trace.
    """
    if chain.has_streams or chain.history:
        return chain
    return replace(chain, proof=_proof(tape, chain))


def _reads_elsewhere(tape: Tape, states: Sequence[Value | None]) -> int | None:
    """The depth after which a branch reads a sum of the state and of what earlier depths gave; None where none does."""
    trace = tape.trace
    assert trace is not None
    shown = {
        value.number: value for call in tape.calls for _, _, value in call.shown() if value.step is not None
    }
    for depth, before, after, read in _sums_between(states, shown):
        if not read.sources:  # the state alone, which is most of what is shown
            continue
        earlier = [state for state in states[:depth] if state is not None]
        mixed = any(_from_states(trace, source, before, earlier) for source in read.sources)
        if mixed and trace.depends(after, read.target):
            return depth
    return None


def _sums_between(
    states: Sequence[Value | None], shown: Mapping[int, Value]
) -> Iterator[tuple[int, Value, Value, LinearDependence]]:
    """The values between two states that are sums with the first of these, such as what a branch or a block takes.

    Yields the depth of the first, the two states, and how the value depends on the first.
    """
    numbers = sorted(shown)
    for depth, (before, after) in enumerate(pairwise(states)):
        if before is None or after is None or before.shape != after.shape:
            continue
        for number in numbers[bisect_right(numbers, before.number) : bisect_left(numbers, after.number)]:
            value = shown[number]
            if value.shape == before.shape and _leads_back(value, before):
                read = LinearDependence(value, [before])
                if read.reached:
                    yield depth, before, after, read


def _leads_back(value: Value, before: Value) -> bool:
    """Whether transparent steps lead from a value back to an earlier one at all, before their map is worked out."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current is before:
            return True
        step = current.step
        if step is None or step.rule.function or current.number in seen or current.number < before.number:
            continue
        seen.add(current.number)
        waiting += step.operands
    return False


def _proof(tape: Tape, chain: Chain) -> str:
    if tape.trace is None or tape.trace.error is not None:
        why = "" if tape.trace is None else f" ({tape.trace.error})"
        return f"unproven: the operations of the forward could not be followed{why}"
    states = states_of(tape, chain.points)
    steps = list(plain_steps(tape.trace, states))
    for depth, doubt in steps:
        if doubt:
            return f"unproven: from depth {depth} to {depth + 1}, {doubt}"
    if not steps:
        return f"unproven: {NO_STEP}"
    elsewhere = _reads_elsewhere(tape, states)
    if elsewhere is not None:
        return (
            f"unproven: after depth {elsewhere}, a branch reads a sum of the state and of what earlier depths gave, which is "
            "a connection over depth"
        )
    return PROVEN


def with_shown_inputs(tape: Tape, chain: Chain) -> Chain:
    """A proven chain; unproven where a block takes another state than is shown, such as with positions added before it.

    ``tape``: the calls of the first forward, with its trace.
    """
    changed = _taken_changed(tape, states_of(tape, chain.points)) if chain.proof == PROVEN else None
    if changed is None:
        return chain
    depth, path = changed
    why = f"{path} takes the state of depth {depth} with something added that does not come from it"
    return replace(chain, proof=f"unproven: {why}, and no depth shows that sum")


def _taken_changed(tape: Tape, states: Sequence[Value | None]) -> tuple[int, str] | None:
    """The depth after which a block takes another state than the one shown, and the block."""
    trace = tape.trace
    if trace is None:
        return None
    # A block gives what it takes, and has parts; the input of a norm is inside of one.
    blocks = [call for call in tape.calls if call.module._modules and call.x_shape == call.y_shape]
    taken = {
        value.number: (value, call.path)
        for call in blocks
        if (value := call.values[0]) is not None and value.step is not None
    }
    for depth, before, after, read in _sums_between(states, {n: value for n, (value, _) in taken.items()}):
        from_elsewhere = any(not trace.depends(source.root, before) for source in read.sources)
        # A parameter is no value of the forward: the sum with one has a single operand.
        with_constant = any(
            of.step is not None and of.step.rule.sums and len(of.step.operands) == 1
            for of in read.carrying
            if of is not before
        )
        if (from_elsewhere or with_constant) and trace.depends(after, read.target):
            return depth, taken[read.target.number][1]
    return None


def states_of(tape: Tape, points: Sequence[HookPoint]) -> list[Value | None]:
    """The values that some hook points showed."""
    calls = tape.by_key()
    return [
        _made(tape, p) if p.at == "operation" else calls[p.path, p.method, p.index].value_of(p.at, p.item)
        for p in points
    ]


def _made(tape: Tape, point: HookPoint) -> Value | None:
    value = tape.recorded(point)
    return None if value is None else tape.twins.get(value.number)
