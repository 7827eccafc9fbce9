"""Which chains of a model are taken? Those of its modules where they are proven, else those that its values make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from torch import nn

from depthscope.probes.connections.family import Site, StreamConnectionError
from depthscope.probes.dataflow.linear import ReplayError
from depthscope.probes.dataflow.values import Value
from depthscope.probes.model.modules import module_paths
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph
from depthscope.probes.reading.read import Rereading
from depthscope.probes.structure.chain import READ, Chain
from depthscope.probes.structure.deferred_branches import with_deferred_branches
from depthscope.probes.structure.depth_reads import depth_chain, find_depth_reads
from depthscope.probes.structure.find_chains import (
    FINER_SHARE,
    FURTHER_SHARE,
    TRUNK_SHARE,
    distinct_names,
    find_chains,
    with_final,
)
from depthscope.probes.structure.inner_streams import inner_streams
from depthscope.probes.structure.plain_proof import (
    CANCELLED,
    NO_STEP,
    PROVEN,
    states_of,
    with_proof,
    with_shown_inputs,
)
from depthscope.probes.structure.ran_parameters import ran_parameters
from depthscope.probes.structure.read_chains import read_chain
from depthscope.probes.structure.read_layout import read_layout
from depthscope.probes.structure.read_parts import ReadStructure, depth_family
from depthscope.probes.structure.tape import Call, ChainError, SeveralStatesError, Tape
from depthscope.probes.structure.traced_streams import traced_streams
from depthscope.probes.structure.value_chain import (
    carried_values,
    skips_blocks,
    unchanged_origin,
    value_chains,
)

NO_END = "unproven: more is added to the last state, and no module shows what comes of it"
NUMBERED = re.compile(r"chain\d+")


@dataclass(frozen=True)
class FoundChains:
    """The chains of a model, and the stream connections of the first one by their numbers, where the trace showed them."""

    chains: tuple[Chain, ...]
    traced: Mapping[int, Site] = field(default_factory=dict)
    inner_streams: int = 0
    read: ReadStructure | None = None


def proven_chains(
    tape: Tape,
    model: nn.Module,
    *,
    batch_size: int,
    layers: Sequence[str] | None = None,
    inside: bool = False,
) -> FoundChains:
    """Find the residual chains of a model, each with its proof or the reason why there is none.

    ``tape``: the calls of the first forward, with its trace.
    ``layers``: as in `find_chains`: the user's own blocks are taken whatever else is found.
    ``inside``: whether the states inside of plain blocks are wanted.
    Raises ChainError: Where neither the calls nor the values form a chain.
    """
    if layers is None and not tape.connection_calls():
        read = _chains_of_memories(tape, model, batch_size=batch_size, inside=inside)
        if read is not None:
            return read
    refusal: ChainError | None = None
    chains: list[Chain] = []
    try:
        chains = _chains_of_modules(tape, model, layers)
    except ChainError as error:
        if layers is not None:
            raise
        refusal = error
    if layers is not None or any(chain.has_streams or chain.history for chain in chains):
        return FoundChains(tuple(_with_an_end(tape, chain) for chain in chains))
    carried = [(chain, states, _share(tape, model, states)) for chain, states in value_chains(tape, model)]
    try:
        found = _carried_chains(tape, model, carried, chains)
        mixed = isinstance(refusal, SeveralStatesError)
    except StreamConnectionError:
        found, mixed = (
            None,
            True,
        )  # the states may be captured all the same, where the user says what they are
    # A block that multiplies the state by zero, or gives another one, is a fault of a plain model: no connection over depth.
    mixed = mixed or any(chain.proof.endswith(CANCELLED) for chain in chains)
    mixed = mixed or (
        found is None and _broken_by_a_block(tape, [states for _, states, _ in carried], chains)
    )
    if not mixed and (refusal is not None or any(chain.proof != PROVEN for chain in chains)):
        # Sums over a few blocks are chains too, of a part of the model.
        share = 0.0 if found is None else max(share for _, _, share in carried)
        found = _chain_over_depth(tape, model, batch_size, above=share) or found
    if found is None and refusal is not None:
        raise refusal
    found = _with_other_towers(tape, found or FoundChains(tuple(chains)), chains, carried)
    for chain in found.chains:
        _require_all_blocks(tape, model, chain)
    return replace(
        found, chains=tuple(_with_all_blocks(tape, model, chain, found.chains) for chain in found.chains)
    )


def _chains_of_memories(tape: Tape, model: nn.Module, *, batch_size: int, inside: bool) -> FoundChains | None:
    """The chains of the memories of the recorded graph; None where these are not proven, or are stages of one trunk."""
    assert tape.recorder is not None
    graph = tape.recorder.graph
    if graph.error is not None or tape.split:
        return None
    rereading = Rereading(graph)
    memories = rereading.reading.memories
    if not memories or not memories[0].is_proven or _has_stages(graph, memories):
        return None
    if memories[0].num_streams > 1 or memories[0].over_depth:
        return weighed_chain(tape, rereading, batch_size)
    least = FURTHER_SHARE * memories[0].weights["branches"]
    further = [m for m in memories[1:] if m.is_proven and m.weights["branches"] >= least]
    taken = [memories[0], *(m for m in further if m.num_streams == 1 and not m.over_depth)]
    chains = [with_final(tape, read_chain(graph, memory, inside=inside).chain) for memory in taken]
    for chain in chains:
        _require_all_blocks(tape, model, chain)
    modules = _proven_chains_of_modules(tape, model)
    if _share_of_blocks(tape, model, chains) < FINER_SHARE * _share_of_blocks(tape, model, modules):
        return None  # stages of which the reading has one
    found = _with_other_towers(
        tape, FoundChains(tuple(chains), inner_streams=memories[0].inner_streams), modules, []
    )
    return replace(found, chains=_with_names(sorted(found.chains, key=partial(_begin, tape)), tape))


def _proven_chains_of_modules(tape: Tape, model: nn.Module) -> list[Chain]:
    try:
        return [chain for chain in _chains_of_modules(tape, model, None) if chain.proof == PROVEN]
    except ChainError:
        return []


def _share_of_blocks(tape: Tape, model: nn.Module, chains: Sequence[Chain]) -> float:
    """Share of the parameters that ran of those in the blocks of some chains."""
    ran, modules = ran_parameters(tape, model), dict(module_paths(model))
    paths = {path for chain in chains for path in chain.blocks if path in modules}
    return ran.share(set().union(*(ran.within(modules[path]) for path in paths)))


def _begin(tape: Tape, chain: Chain) -> int:
    """The order of the first call of a chain's blocks."""
    return min((call.order for call in tape.calls if call.path in chain.blocks), default=0)


def weighed_chain(tape: Tape, rereading: Rereading, batch_size: int) -> FoundChains | None:
    """The chain of the first memory, which has streams or sums over depth; None where it has no place for what was read."""
    memory = rereading.reading.memories[0]
    chain = read_chain(rereading.graph, memory, inside=False).chain
    twin = tape.twins.get(memory.root)
    axes = None if twin is None else twin.axes
    layouts = {read_layout(memory, state, axes, batch_size) for state in memory.states}
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is None or not chain.connections:
        return None
    read = ReadStructure(rereading, layout, memory.num_streams)
    try:
        weights = read.weights(memory, batch_size)
    except StreamConnectionError:
        return None
    if memory.over_depth:
        chain = replace(chain, family=depth_family([of for of, _ in weights]))
        return FoundChains((with_final(tape, chain),), read=read)
    family = "hc" if read.mixes else "independent_hc"
    family = "gated" if any(of.read is None for of, _ in weights) else family
    site = Site(READ, family, memory.num_streams, layout, mixes=read.mixes, reads_features=family == "gated")
    chain = with_final(tape, replace(chain, proof=""), memory.num_streams)
    return FoundChains((chain,), dict.fromkeys(range(len(chain.connections)), site), read=read)


def _has_stages(graph: Graph, memories: Sequence[MemoryReading]) -> bool:
    """Whether a memory begins with what the last state of another one was made to, in blocks of the same class."""
    for one in memories:
        for other in memories:
            end = graph.values[one.states[-1].values[-1]]
            first = graph.values[other.root]
            if one is not other and first.number > end.number and graph.depends(first, end):
                return True
    return False


def _chains_of_modules(tape: Tape, model: nn.Module, layers: Sequence[str] | None) -> list[Chain]:
    found = find_chains(tape, model, layers=layers)
    return _with_steps(tape, [with_proof(tape, with_deferred_branches(tape, chain)) for chain in found])


def _with_steps(tape: Tape, chains: list[Chain]) -> list[Chain]:
    """Without those of which every step changes the shape, where others are proven: a neck of convolutions is no chain."""
    if not any(chain.proof == PROVEN for chain in chains):
        return chains
    kept = [chain for chain in chains if not chain.proof.endswith(NO_STEP)]
    # Tracks are called after arguments; numbers, or the name of one of several, say nothing of those that are left.
    if len(kept) < len(chains) and (len(kept) == 1 or any(NUMBERED.fullmatch(chain.name) for chain in kept)):
        return list(_with_names(kept, tape))
    return kept


def _with_other_towers(
    tape: Tape,
    found: FoundChains,
    chains: Sequence[Chain],
    carried: Sequence[tuple[Chain, list[Value], float]],
) -> FoundChains:
    """The chains that were found, and proven ones of modules or values of blocks of which these have nothing."""
    taken = list(found.chains)
    if taken[0].has_streams:  # all chains would be read as if they had streams
        return found
    large = [with_final(tape, chain) for chain, _, share in carried if share >= FURTHER_SHARE]
    for other in [*chains, *large]:
        if any(_have_blocks_in_common(other, chain) for chain in taken):
            continue
        proven = with_proof(tape, other)
        taken += [proven] if proven.proof == PROVEN else []
    if len(taken) == len(found.chains):
        return found
    return replace(found, chains=_with_names(taken, tape))


def _with_names(chains: Sequence[Chain], tape: Tape) -> tuple[Chain, ...]:
    """Chains with distinct names, by their blocks; a chain that is alone has none.

    Of the same blocks by the parameters that these take the states as.
    """
    # A state that begins without any module has no block; numbers tell chains from one another then.
    first = [chain.blocks[0] if chain.blocks else "" for chain in chains]
    names = [_parameter(tape, chain) for chain in chains] if len(set(first)) == 1 < len(first) else first
    if len(set(names)) < len(names) or not all(names):
        names = first
    return tuple(replace(chain, name=name) for chain, name in zip(chains, distinct_names(names), strict=True))


def _parameter(tape: Tape, chain: Chain) -> str:
    """As which parameter of its forward the first block takes a chain's state."""
    for point in chain.points:
        call = tape.by_key()[point.path, point.method, point.index]
        if point.at == "input" and point.path in chain.blocks:
            return call.inputs[point.item].name if call.inputs else ""
    return ""


def _have_blocks_in_common(a: Chain, b: Chain) -> bool:
    return any(
        one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
        for one in a.blocks
        for other in b.blocks
    )


def _carried_chains(
    tape: Tape, model: nn.Module, carried: Sequence[tuple[Chain, list[Value], float]], chains: Sequence[Chain]
) -> FoundChains | None:
    """The chains of the values, where they show what those of the modules do not; None where these are as good."""
    carried = [each for each in carried if each[2] >= FURTHER_SHARE]
    if not carried or carried[0][2] < TRUNK_SHARE:
        return None
    if any(skips_blocks(tape, model, states) for _, states, _ in carried):
        return None
    streams = traced_streams(tape, *carried[0][:2])
    if streams is not None:
        chain = with_final(tape, streams.chain, streams.sites[0].num_streams)
        return FoundChains((chain,), streams.sites)
    pieces = [states for _, states, _ in carried]
    if chains and (_broken_by_a_block(tape, pieces, chains) or not _explain_more(tape, pieces, chains)):
        return None
    proven = [with_proof(tape, with_final(tape, chain)) for chain, _, _ in carried]
    copies = inner_streams(carried[0][1])
    if copies:
        # No plain step, and no connection between states either: the matrices act inside the blocks alone.
        why = f"unproven: {copies} streams are expanded and merged inside each step, and one is handed on"
        return FoundChains((replace(chains[0] if chains else proven[0], proof=why),))
    if any(chain.proof != PROVEN for chain in proven):
        return None
    return FoundChains(_with_names(proven, tape))


def _chain_over_depth(tape: Tape, model: nn.Module, batch_size: int, *, above: float) -> FoundChains | None:
    """The chain of the sums over depth that the branches read, where more of the weights work on them than on other chains."""
    reads = find_depth_reads(tape)
    share = 0.0 if reads is None else _share(tape, model, (reads.sources[0], reads.reads[-1]))
    if reads is None or share < TRUNK_SHARE or share * FINER_SHARE <= above:
        return None
    try:
        chain = depth_chain(tape, model, reads, batch_size)
    except (StreamConnectionError, ReplayError):
        return None
    return None if chain is None else FoundChains((replace(with_final(tape, chain), proof=PROVEN),))


def _share(tape: Tape, model: nn.Module, states: Sequence[Value]) -> float:
    """Share of the parameters that ran of the modules that computed something between the first and the last state."""
    assert tape.trace is not None
    began = tape.trace.calls[states[0].number]
    orders = set(tape.trace.calls_between(states[-1], states[0]))
    modules = [tape.calls[order].module for order in orders if order >= 0 and order != began]
    ran = ran_parameters(tape, model)
    return ran.share(ran.own(modules))


def _explain_more(tape: Tape, carried: Sequence[Sequence[Value]], chains: Sequence[Chain]) -> bool:
    """Whether the chains of the values have what those of the modules lack: a proof, or states before, between or after."""
    theirs = [
        [unchanged_origin(state).number for state in states_of(tape, chain.points) if state is not None]
        for chain in chains
    ]
    if any(chain.proof != PROVEN for chain in chains):
        # What the blocks hand on is carried, and is not among the states of the values: these would lack it.
        return not any(_lacks(tape, states, numbers) for states in carried for numbers in theirs)
    for states in carried:
        ours = [unchanged_origin(state).number for state in states]
        within = [numbers for numbers in theirs if set(numbers) <= set(ours)]
        # Of several chains, as of an encoder and a decoder or of two tracks, only those that are one are put together.
        longer = len(chains) == 1 and within and (ours[0] < within[0][0] or ours[-1] > within[-1][-1])
        if longer or len(within) > 1:
            return True
    return False


def _broken_by_a_block(tape: Tape, carried: Sequence[Sequence[Value]], chains: Sequence[Chain]) -> bool:
    """Whether a block of a chain of modules ends one chain of values and gives the first state of the next one.

    Such a block makes another state of the one that it takes. That is what is to be told of it: read as two chains, nothing
    would lie between them.
    """
    firsts = {unchanged_origin(states[0]).number for states in carried}
    within = [{unchanged_origin(state).number for state in states} for states in carried]
    for chain in chains:
        states = states_of(tape, chain.points)
        for point, before, after in zip(chain.points[1:], states, states[1:], strict=False):
            if before is None or after is None or point.site != "post":
                continue
            taken, given = unchanged_origin(before).number, unchanged_origin(after).number
            if given in firsts and any(taken in numbers and given not in numbers for numbers in within):
                return True
    return False


def _lacks(tape: Tape, states: Sequence[Value], numbers: Sequence[int]) -> bool:
    """Whether some values by their numbers are all on the way of the carried states, and not all of them are states."""
    assert tape.trace is not None
    ours = {unchanged_origin(state).number for state in states}
    way = {
        unchanged_origin(value).number for group in carried_values(tape.trace, states[-1]) for value in group
    }
    return set(numbers) <= way and not set(numbers) <= ours


def _require_all_blocks(tape: Tape, model: nn.Module, chain: Chain) -> None:
    """Refuse a forward that left out some of its blocks: their depths would be given to others."""
    modules = dict(module_paths(model))
    ran = {call.path[:end] for call in tape.calls for end in _ends(call.path)}
    lists = {
        (path.rpartition(".")[0], type(modules[path]))
        for path in chain.blocks
        if path in modules and path.rpartition(".")[2].isdigit()
    }
    for container, kind in lists:
        missing = [
            other
            for name, child in modules[container].named_children()
            if name.isdigit()
            and type(child) is kind
            and (other := f"{container}.{name}".lstrip(".")) not in ran
        ]
        if missing:
            raise ChainError(
                f"{', '.join(missing[:3])} did not run in this forward, and blocks like it did (layer drop leaves blocks out "
                "in training mode, for one); measure in evaluation mode, or name the blocks that run with layers="
            )


def _with_all_blocks(tape: Tape, model: nn.Module, chain: Chain, chains: Sequence[Chain]) -> Chain:
    """A chain; unproven where a block like its own ran and is on no chain, so that its state is missing."""
    modules = dict(module_paths(model))
    known = {path for other in chains for path in other.blocks}
    around = {path[:end] for path in known for end in _ends(path)}
    kinds = {
        type(modules[path])
        for path in chain.blocks
        if path in modules
        and type(modules[path]) is not nn.Sequential
        and any(True for _ in modules[path].children())
    }
    if chain.proof == PROVEN and _goes_on(tape, chain, chains):
        return replace(chain, proof=NO_END)
    chain = chain if chain.has_streams or chain.history else with_shown_inputs(tape, chain)
    for call in tape.calls if chain.proof == PROVEN else ():
        path = call.path
        if (
            type(call.module) in kinds
            and path not in around
            and not any(path[:end] in known for end in _ends(path))
            and _has_to_do_with(tape, chain, call)
        ):
            why = (
                f"unproven: {path} ran, like the blocks of the chain, and what came of it is not on the chain"
            )
            return replace(chain, proof=why)
    return chain


def _has_to_do_with(tape: Tape, chain: Chain, call: Call) -> bool:
    """Whether a call worked on what came of a chain, or a chain on what came of it; another tower does neither."""
    first, last = states_of(tape, (chain.points[0], chain.points[-1]))
    taken, given = call.values
    if tape.trace is None or first is None or last is None or taken is None or given is None:
        return True
    return tape.trace.depends(taken, first) or tape.trace.depends(last, given)


def _with_an_end(tape: Tape, chain: Chain) -> Chain:
    """A chain of the user's blocks; unproven where the last one hands on a branch that is added after it.

    Otherwise the user may well have named the first blocks of several.
    """
    deferred = chain.points[-1].site == "mid" and chain.proof == PROVEN
    return replace(chain, proof=NO_END) if deferred and _goes_on(tape, chain, ()) else chain


def _goes_on(tape: Tape, chain: Chain, chains: Sequence[Chain]) -> bool:
    """Whether the state after the last block goes through further sums with what was computed from it, on no other chain."""
    (last,) = states_of(tape, chain.points[-1:])
    trace = tape.trace
    if last is None or trace is None or trace.most_merged is None or last.merges == 0:
        return False
    sums = [group[0].number for group in carried_values(trace, trace.most_merged)]
    further = [number for number in sums if number > last.root]
    if last.root not in sums or not further:
        return False
    for other in chains:
        first, end = states_of(tape, (other.points[0], other.points[-1]))
        # Another chain goes on where this one ends: nothing was added in between.
        begins = first is not None and first.number >= last.number and trace.depends(first, last)
        if other is not chain and begins and end is not None and first is not None and end.root in further:
            return any(number < first.root for number in further)
    return True


@lru_cache(maxsize=1 << 14)
def _ends(path: str) -> tuple[int, ...]:
    """Where the path of a module and of those that contain it end."""
    return len(path), *(position for position, letter in enumerate(path) if letter == ".")
