"""Do the branches of a model read sums over depth, of the embedding and of branches' outputs? Found in the trace.

Attention residuals, DenseFormer, skips across the middle and histories have no state that is carried from one branch to the
next: each branch k reads h_k = Σ_j C_kj v_j of the sources v_0 (the embedding) and v_j (the output of branch j). The states
of such a chain are these sums, and what the last of them gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import nn

from depthscope.probes.connections.family import StreamConnectionError
from depthscope.probes.dataflow.axes import layout_of
from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Step, Value, carrier_of
from depthscope.probes.model.layout import canonical
from depthscope.probes.structure.chain import DEPTH, Chain, Connection
from depthscope.probes.structure.stream_chain import branch_label
from depthscope.probes.structure.tape import Tape
from depthscope.probes.structure.value_chain import CarriedState, ShownValues, chain_of_states

FEWEST = 3  # sources: with two, the embedding and one output, a connection over depth is an ordinary sum
# Weights that differ by more than this between features are no scalars; see `connections.families.traced`.
EQUAL = 2e-2


@dataclass(frozen=True)
class DepthReads:
    """The sources of a model, and the sums of them that its branches read.

    Parameters
    ----------
    sources : tuple of Value
        v_0 … v_K.
    reads : tuple of Value
        h_1 … h_K, and the sum after the last source.
    """

    sources: tuple[Value, ...]
    reads: tuple[Value, ...]


def find_depth_reads(tape: Tape) -> DepthReads | None:
    """The sources that the widest sum over depth adds up, and what each of them was computed from.

    ``tape``: the calls of the first forward, with its trace.
    Returns: None where no such sum exists, or some source was not computed from one sum alone.
    """
    trace = tape.trace
    if trace is None or trace.error is not None or tape.split:
        return None
    shown = {value.number: value for call in tape.calls for _, _, value in call.shown()}
    begins = _embedding(trace, shown)
    sums = {number: found for number, value in shown.items() if (found := _sources_of(value, begins))}
    if not sums:
        return None
    most = max(len(found) for found in sums.values())
    if most < FEWEST:
        return None
    last = _last_sum([shown[number] for number in sorted(sums) if len(sums[number]) == most])
    sources = sorted(sums[last.number].values(), key=lambda value: value.number)
    known = {source.number for source in sources}
    reads = []
    for position, source in enumerate(sources[1:], 1):
        earlier = {other.number for other in sources[:position]}
        read = _read_by(trace, source, shown, sums, earlier, known)
        if read is None:
            return None
        reads.append(read)
    # Two branches that read one sum leave no state between them.
    if len({read.number for read in (*reads, last)}) <= len(reads):
        return None
    return DepthReads(tuple(sources), (*reads, last))


def _last_sum(widest: Sequence[Value]) -> Value:
    """The last of the sums of all sources; one that only scales another, as a norm does, is no sum of its own."""
    last = widest[0]
    for value in widest[1:]:
        over = LinearDependence(value, [last])
        if not over.reached or over.sources:
            last = value
    return last


def _sources_of(value: Value, begins: Value | None) -> dict[int, Value]:
    """What no transparent step made, of all that is added up in a value, by number and without the weights of the sum.

    A sum with constants, such as learned positions, is a source as a whole, and so is the value in which all sums begin.
    Empty where a source is not of the value's size.
    """
    found = _added_up(value, begins)
    size = math.prod(value.shape)
    return found if all(math.prod(source.shape) == size for source in found.values()) else {}


def _added_up(value: Value, begins: Value | None = None) -> dict[int, Value]:
    found: dict[int, Value] = {}
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if current.number in seen:
            continue
        seen.add(current.number)
        step = current.step
        if step is None or step.rule.function or current is begins or _adds_constant(step):
            found[current.number] = current
        elif step.rule.product:
            waiting.append(carrier_of(step))
        else:
            waiting += step.operands
    return found


def _adds_constant(step: Step) -> bool:
    """Whether a step adds what is no value of the forward, such as a parameter, and is not zero.

    Zeros are what `sum` of a list and velocities begin with.
    """
    if not step.rule.sums or len(step.operands) > 1:
        return False
    added = [step.args[position] for position in step.rule.zero if position < len(step.args)]
    return any(
        bool((constant != 0).any()) if isinstance(constant, torch.Tensor) else constant != 0
        for constant in added
        if not isinstance(constant, Value)
    )


def _embedding(trace: Trace, shown: Mapping[int, Value]) -> Value | None:
    """The shown sum of parts that were not computed from one another, such as tokens and positions.

    None where there is no such sum, or where a part of it is also added without the others.
    """
    added = {number: set(_added_up(value)) for number, value in shown.items()}
    if not added:
        return None
    widest = max(added, key=lambda number: len(added[number]))
    begins: Value | None = None
    for number in sorted(added):
        few = len(added[number]) <= (1 if begins is None else len(added[begins.number]))
        if few or shown[number].shape != shown[widest].shape or not added[number] < added[widest]:
            continue
        parts = _added_up(shown[number]).values()
        if not any(trace.depends(one, other.number) for one, other in permutations(parts, 2)):
            begins = shown[number]
    if begins is None or added[begins.number] & set(_added_up(shown[widest], begins)):
        return None
    return begins


def _read_by(
    trace: Trace,
    source: Value,
    shown: Mapping[int, Value],
    sums: Mapping[int, Mapping[int, Value]],
    earlier: set[int],
    known: set[int],
) -> Value | None:
    """The first shown sum of earlier sources through which alone a source was computed from any of them."""
    for number in sorted(sums):
        fits = number < source.number and set(sums[number]) <= earlier
        if fits and trace.depends(source, number) and _only_through(trace, source.number, number, known):
            return shown[number]
    return None


def _only_through(trace: Trace, number: int, gate: int, known: set[int]) -> bool:
    """Whether every way from a value back to the sources goes through one value."""
    seen: set[int] = set()
    waiting = [number]
    while waiting:
        for parent in trace.parents[waiting.pop()]:
            if parent == gate or parent in seen:
                continue
            if parent in known:
                return False
            seen.add(parent)
            waiting.append(parent)
    return True


def depth_chain(tape: Tape, model: nn.Module, found: DepthReads, batch_size: int) -> Chain | None:
    """The chain of the sums that the branches read.

    Returns: None where the layout of the states does not show, or a source is shown by no module.
    """
    shown = ShownValues(tape)
    states = [CarriedState(value, shown.places(value)) for value in found.reads]
    layout = layout_of(found.reads[0].axes, None)
    branches = [shown.returned(source) for source in found.sources[1:]]
    if layout is None or len({value.shape for value in found.reads}) > 1 or None in branches:
        return None
    connections = []
    chain = chain_of_states(tape, model, states)
    for number, branch in enumerate(branches):
        assert branch is not None
        connections.append(
            Connection(
                path=branch.path,
                index=number,
                layer=chain.points[number + 1].layer,
                branch=branch_label(
                    branch.path.rpartition(".")[2], type(branch.module).__name__, branch.path
                ),
                branch_path=branch.path,
                branch_index=branch.index,
                style=DEPTH,
                depth_in=number,
                depth_out=number + 1,
            )
        )
    # A sum that no module returned is the state before the next block, and no block's output.
    points = list(chain.points)
    for number in range(1, len(points) - 1):
        layer = points[number + 1].layer
        if layer != points[number].layer and not any(at == "output" for _, at, _ in states[number].places):
            points[number] = replace(points[number], layer=layer, site="pre")
    weights = read_weights(found, layout, batch_size)
    # Weights that are the same at every token are learned ones, others are an attention.
    same = bool((weights == weights[:1, :1]).all())
    family = "depth_history" if same else "depth_attention"
    if bool((weights == torch.ones_like(weights).tril()).all()):
        family = "residual"  # every branch reads the embedding and all earlier outputs once: a plain state
    return replace(chain, points=tuple(points), connections=tuple(connections), history=True, family=family)


def read_weights(found: DepthReads, layout: str, batch_size: int) -> torch.Tensor:
    """How much of each source each sum has, at every token.

    ``found``: the sources and sums of one forward.
    Returns: (B, T, K + 1, K + 1): by sum and source.
    Raises StreamConnectionError: Where a weight differs between features, or where the sum is not one of each token by
    itself.
    """
    rows = []
    for value in found.reads:
        over = LinearDependence(value, found.sources)
        row: list[torch.Tensor] = []
        for source in found.sources:
            one = torch.ones(source.shape, dtype=source.dtype, device=source.device)
            reached = (
                one
                if value is source
                else over.apply({source.number: one})
                if source in over.reached
                else None
            )
            weights = torch.zeros((), device=value.device).expand(value.shape) if reached is None else reached
            tokens = canonical(weights, layout, batch_size=batch_size, num_streams=1).squeeze(2)
            if float((tokens - tokens[..., :1]).abs().max()) > EQUAL * max(float(tokens.abs().max()), 1.0):
                raise StreamConnectionError("the weights of a sum over depth differ between features")
            row.append(tokens[..., 0].float())
        rows.append(torch.stack(row, -1))
        _require_sum_of_tokens(value, over, found.sources, rows[-1], layout, batch_size)
    return torch.stack(rows, -2)


def _require_sum_of_tokens(
    value: Value,
    over: LinearDependence,
    sources: Sequence[Value],
    row: torch.Tensor,
    layout: str,
    batch_size: int,
) -> None:
    """Refuse a sum that is more than its weights say: one that moves or averages tokens gives ones for ones as well."""
    generator = torch.Generator().manual_seed(0)
    # Of the state's shape; a linear layer gives its output with batch and tokens in one axis.
    noise = [torch.randn(value.shape, generator=generator).to(value.device, value.dtype) for _ in sources]
    given = {source.number: of.reshape(source.shape) for source, of in zip(sources, noise, strict=True)}
    summed = given[value.number] if value.number in given else over.apply(given)
    if summed is None:
        return

    def by_token(tensor: torch.Tensor) -> torch.Tensor:
        return canonical(tensor, layout, batch_size=batch_size, num_streams=1).squeeze(2).float()

    expected = torch.zeros_like(by_token(summed))
    for weight, of in zip(row.unbind(-1), noise, strict=True):
        expected += weight.unsqueeze(-1) * by_token(of)
    if not float((by_token(summed) - expected).norm()) <= EQUAL * float(expected.norm()):
        raise StreamConnectionError("a sum over depth moves or mixes tokens or features")
