"""Which chains of a model are taken? Those of its modules where they are proven, else those that the values themselves make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from depthscope.probes.connections.family import Site
from depthscope.probes.dataflow.trace import Value
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.find_chains import TRUNK_SHARE, find_chains, trunk_size, with_final
from depthscope.probes.structure.plain_proof import PROVEN, states_of, with_proof
from depthscope.probes.structure.tape import ChainError, Tape
from depthscope.probes.structure.traced_streams import traced_streams
from depthscope.probes.structure.value_chain import unchanged_origin, value_chain


@dataclass(frozen=True)
class FoundChains:
    """The chains of a model, and the stream connections of the first one by their numbers, where the trace showed them."""

    chains: tuple[Chain, ...]
    traced: Mapping[int, Site] = field(default_factory=dict)


def proven_chains(tape: Tape, model: nn.Module, *, layers: Sequence[str] | None = None) -> FoundChains:
    """Find the residual chains of a model, each with its proof or the reason why there is none.

    Parameters
    ----------
    tape : Tape
        The calls of the first forward, with its trace.
    model : Module
        The model.
    layers : sequence of str, optional
        As in `find_chains`: the user's own blocks are taken whatever else is found.

    Returns
    -------
    FoundChains

    Raises
    ------
    ChainError
        Where neither the calls nor the values form a chain.
    """
    refusal: ChainError | None = None
    chains: list[Chain] = []
    try:
        chains = [with_proof(tape, chain) for chain in find_chains(tape, model, layers=layers)]
    except ChainError as error:
        refusal = error
        if layers is not None:
            raise
    if layers is not None or any(chain.has_streams or chain.history for chain in chains):
        return FoundChains(tuple(chains))
    if len(chains) > 1 and all(chain.proof == PROVEN for chain in chains):
        return FoundChains(tuple(chains))
    carried = _carried_chain(tape, model)
    streams = None if carried is None else traced_streams(tape, *carried)
    if streams is not None:
        chain = with_final(tape, streams.chain, streams.sites[0].num_streams)
        return FoundChains((chain,), streams.sites)
    if carried is not None and (not chains or _explains_more(tape, carried[0], chains[0])):
        proven = with_proof(tape, with_final(tape, carried[0]))
        if proven.proof == PROVEN:
            return FoundChains((proven,))
    if refusal is not None:
        raise refusal
    return FoundChains(tuple(chains))


def _carried_chain(tape: Tape, model: nn.Module) -> tuple[Chain, list[Value]] | None:
    """The chain of the values, where most of the model's weights work on it."""
    found = value_chain(tape, model)
    if found is None:
        return None
    share = _parameters_on(tape, found[1]) / trunk_size(tape, model)
    return found if share >= TRUNK_SHARE else None


def _parameters_on(tape: Tape, states: Sequence[Value]) -> int:
    """Number of parameters of the modules that computed something between the first and the last state."""
    assert tape.trace is not None
    orders = set(tape.trace.calls_between(states[-1], frozenset([states[0].number])))
    began = tape.trace.calls[states[0].number]
    modules = [tape.calls[order].module for order in orders if order >= 0 and order != began]
    own = {id(p): p.numel() for module in modules for p in module.parameters(recurse=False)}
    return sum(own.values())


def _explains_more(tape: Tape, carried: Chain, found: Chain) -> bool:
    """Whether the chain of the values has what the chain of the modules lacks: a proof, or states before or after it."""
    if found.proof != PROVEN:
        return True
    ours = [unchanged_origin(state) for state in states_of(tape, carried.points) if state is not None]
    theirs = [unchanged_origin(state) for state in states_of(tape, found.points) if state is not None]
    numbers = {state.number for state in ours}
    return all(state.number in numbers for state in theirs) and (
        ours[0].number < theirs[0].number or ours[-1].number > theirs[-1].number
    )
