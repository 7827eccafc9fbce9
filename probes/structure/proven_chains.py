"""Which chains of a model are taken? Those of its modules where they are proven, else those that the values themselves make."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.find_chains import TRUNK_SHARE, find_chains, trunk_size, with_final
from depthscope.probes.structure.plain_proof import PROVEN, states_of, with_proof
from depthscope.probes.structure.tape import ChainError, Tape
from depthscope.probes.structure.value_chain import unchanged_origin, value_chain


def proven_chains(tape: Tape, model: nn.Module, *, layers: Sequence[str] | None = None) -> list[Chain]:
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
    list of Chain

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
        return chains
    if len(chains) > 1 and all(chain.proof == PROVEN for chain in chains):
        return chains
    carried = _carried_chain(tape, model)
    if carried is not None and (not chains or _explains_more(tape, carried, chains[0])):
        return [carried]
    if refusal is not None:
        raise refusal
    return chains


def _carried_chain(tape: Tape, model: nn.Module) -> Chain | None:
    """The chain of the values, where it is proven and most of the model's weights work on it."""
    chain = value_chain(tape, model)
    if chain is None:
        return None
    chain = with_proof(tape, with_final(tape, chain))
    share = _parameters_on(tape, chain) / trunk_size(tape, model)
    return chain if chain.proof == PROVEN and share >= TRUNK_SHARE else None


def _parameters_on(tape: Tape, chain: Chain) -> int:
    """Number of parameters of the modules that computed something between the first and the last state."""
    assert tape.trace is not None
    states = [state for state in states_of(tape, chain.points) if state is not None]
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
