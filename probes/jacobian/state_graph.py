"""Which states does one graph link, and which of their entries are meant? Depths, tokens, and what counts as constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.jacobian.derivative_check import require_frozen
from depthscope.probes.jacobian.differentiable_forward import (
    OPERATION,
    JacobianError,
    StartError,
    State,
    constant_weights,
    differentiable_states,
    explained,
)
from depthscope.probes.jacobian.frozen_routing import FrozenRouting
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.model.while_needed import eager
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.session.forward import Forward
from depthscope.probes.session.model_call import call_observed
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.model_structure import Structure

Tokens: TypeAlias = Literal["own", "all"]
Routing: TypeAlias = Literal["full", "frozen"]

SAME_STATE = 1e-2  # relative, of two forwards by other kernels; another state differs by more. Heuristic


@dataclass(frozen=True)
class Selection:
    """Which chain to read, which of its tokens, and what counts as constant; as in `probes.jacobian.jacobian`."""

    options: Options = field(default_factory=Options)
    chain: str | None = None
    tokens: Tokens = "own"
    positions: Sequence[int] | None = None
    routing: Routing = "full"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("tokens", self.tokens, ("own", "all")),
            ("routing", self.routing, ("full", "frozen")),
        ):
            if value not in known:
                raise JacobianError(f"{name} is {value!r}; expected {known[0]!r} or {known[1]!r}")


@dataclass(frozen=True, eq=False)
class Entries:
    """Flat positions of the selected tokens' entries in a state, (P, N, D), and each token's group, (P,)."""

    slots: torch.Tensor
    group: torch.Tensor

    def groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For every group its positions in the packed vector and in the flat state."""
        flat = self.slots.flatten()
        # A token's N·D entries are neighbours in the packed vector.
        of_entry = self.group.repeat_interleave(self.slots[0].numel())
        members = [(of_entry == number).nonzero().squeeze(-1) for number in range(int(self.group.max()) + 1)]
        return [(member, flat[member]) for member in members]


@dataclass(frozen=True, eq=False)
class StateGraph:
    """The states of one forward from start to stop, with the graph between them, and how to read them."""

    start: int
    stop: int
    states: dict[int, State]
    views: Sequence[TracedValue]  # that make the state at start of its tensor
    mask: torch.Tensor | None
    structure: Structure
    number: int  # of the chain
    batch_size: int
    selection: Selection

    def entries(self, start: int, stop: int) -> tuple[Entries, Entries]:
        """Entries of the selected tokens at two depths.

        ``start, stop``: depths that were recorded.
        Returns: In groups that move and see each other: all tokens, or the k-th selected token of every sequence.
        Raises JacobianError: Where the tokens of the two depths differ but must not, or none is left.
        """
        missing = [depth for depth in (start, stop) if depth not in self.states]
        if missing:
            raise JacobianError(
                f"the state at depth {missing[0]} is rewritten in place and shown by no module, or one of its streams is "
                "computed from another; choose other depths"
            )
        source, target = self._positions(start), self._positions(stop)
        # all tokens of both depths may be taken whatever their number; anything else pairs them
        tied = self.selection.tokens == "own" or self.mask is not None or self.selection.positions is not None
        if tied and source.shape[:2] != target.shape[:2]:
            raise JacobianError(
                f"the states at depths {start} and {stop} have {source.shape[1]} and {target.shape[1]} tokens; one token's "
                "own Jacobian, masks and positions need the same tokens: take tokens='all', or depths of one stage"
            )
        return self._selected(source), self._selected(target)

    def _positions(self, depth: int) -> torch.Tensor:
        """Flat positions of a state's entries, (B, T, N, D)."""
        # Numbered entries are rearranged as the state would be: its layout is known in one place only.
        state = self.states[depth].value
        numbers = torch.arange(state.numel(), device=state.device).reshape(state.shape)
        numbers = viewed(numbers, self.views if depth == self.start else ())
        return self.structure.canonical(self.number, numbers, self.batch_size, depth)

    def _selected(self, positions: torch.Tensor) -> Entries:
        """Entries of the tokens that the mask and ``positions=`` leave."""
        selected = torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
        if self.mask is not None:
            selected &= self.mask.to(selected.device)
        if self.selection.positions is not None:
            selected &= _position_mask(self.selection.positions, selected.shape[1]).to(selected.device)
        if not selected.any():
            raise JacobianError("the mask and positions= leave no real token; expected at least one")
        # One token of every sequence makes a group: sequences do not see each other, so a single backward serves all of them.
        order = selected.long().cumsum(1)[selected] - 1
        return Entries(
            positions[selected], order if self.selection.tokens == "own" else torch.zeros_like(order)
        )


def state_graph(
    model: nn.Module, batch: Any, start: int | None, stop: int | None, selection: Selection
) -> StateGraph:
    """Run the model twice, once to find its chain and once to record the graph from start to stop.

    ``model``: the model.
    ``batch``: one batch.
    ``start, stop``: depths; None for the first one at which a graph can begin, and for the last one.
    ``selection``: what to read.
    Raises JacobianError: Where the depths are unknown or nothing links them.
    """
    _require_readable(model, batch, selection)
    session, forward = _find_chains(model, batch, selection)
    number = _chain_number(session.structure.chains, selection.chain)
    chain = session.structure.chains[number]
    first, last = _valid_depths(chain, start or 0, stop)
    # Only the first chain has connections.
    weighs = session.structure.num_streams > 1 or session.structure.connections
    frozen = selection.routing == "frozen" and number == 0 and weighs
    while True:
        routing = FrozenRouting(session, batch) if frozen else None
        try:
            states, views = differentiable_states(model, batch, chain, first, last, routing)
            break
        except StartError:
            if start is not None or first + 1 == last:
                raise
            first += 1
    for depth, state in states.items():
        shown = viewed(state.value, views if depth == first else ())
        _require_same(session.structure, forward, number, depth, shown)
    if routing is not None:
        with explained():  # the check runs backwards of its own
            require_frozen(routing, states)
    return StateGraph(
        start=first,
        stop=last,
        states=states,
        views=views,
        mask=forward.masks.get(number),
        structure=session.structure,
        number=number,
        batch_size=forward.batch_size,
        selection=selection,
    )


def _always(tensor: torch.Tensor, value: TracedValue) -> torch.Tensor:
    return tensor


def viewed(tensor: torch.Tensor, views: Sequence[TracedValue]) -> torch.Tensor:
    """Some recorded views, one after another, of a tensor."""
    for view in views:
        tensor = Graph.run(view, partial(_always, tensor))
    return tensor


def _require_same(
    structure: Structure, forward: Forward, number: int, depth: int, state: torch.Tensor
) -> None:
    """Require that a state that an operation alone shows is the one that was measured: torch may run others for a graph."""
    point = structure.chains[number].points[depth]
    if point.at != OPERATION or not len(forward.rows):
        return
    measured = forward.states[number, depth]
    try:
        found = structure.canonical(number, state.detach(), forward.batch_size, depth)[forward.rows]
    except LayoutError:
        found = None
    same = found is not None and found.shape == measured.shape
    if not same or relative_error(found - measured.to(found.device), measured) > SAME_STATE:
        raise JacobianError(
            f"the state at depth {depth} is made by another operation of {point.path!r} where "
            "a graph is recorded, and no module shows it; choose depths that a module shows"
        )


def _require_readable(model: nn.Module, batch: Any, selection: Selection) -> None:
    # A list or a loader means several batches elsewhere; a Jacobian is that of one forward.
    if not isinstance(batch, (Mapping, torch.Tensor, tuple)):
        raise JacobianError(
            f"got a batch of type {type(batch).__name__}; expected one mapping, tensor or tuple"
        )
    # batch statistics make every token depend on every other one
    mixing = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    if selection.tokens == "own" and mixing:
        raise JacobianError(
            f"the batch norm {mixing[0]!r} is in training mode and mixes sequences, so no token has a Jacobian of its own; "
            "call model.eval(), or take tokens='all'"
        )


def _find_chains(model: nn.Module, batch: Any, selection: Selection) -> tuple[Session, Forward]:
    """Find the chains in a forward of its own, without gradients."""
    session = Session(model, selection.options, scope=Scope(only_own=True))
    session.attach()
    try:
        # Weights that are constants here too: torch runs other operations where they are none.
        with preserved_state(model), constant_weights(model), eager(), torch.no_grad():
            call_observed(session, batch)
        session.raise_first_error()
        assert session.step.last is not None
        return session, session.step.last
    finally:
        session.detach()


def _chain_number(chains: Sequence[Chain], name: str | None) -> int:
    names = [chain.name for chain in chains]
    if name is None:
        return 0
    if name not in names:
        raise JacobianError(f"no chain {name!r}; the model has {', '.join(map(repr, names))}")
    return names.index(name)


def _valid_depths(chain: Chain, start: int, stop: int | None) -> tuple[int, int]:
    deepest = len(chain.points) - 1
    stop = deepest if stop is None else stop
    for name, depth in (("start", start), ("stop", stop)):
        if not 0 <= depth <= deepest:
            raise JacobianError(f"{name} is {depth}; the chain has depths 0 (embedding) … {deepest}")
    if start >= stop:
        raise JacobianError(
            f"start is {start} and stop is {stop}; expected start < stop, since a later state moves no earlier one"
        )
    return start, stop


def _position_mask(positions: Sequence[int], num_tokens: int) -> torch.Tensor:
    outside = [position for position in positions if not 0 <= position < num_tokens]
    if outside:
        raise JacobianError(
            f"positions has {outside[0]}; the states have token positions 0 … {num_tokens - 1}"
        )
    chosen = torch.zeros(num_tokens, dtype=torch.bool)
    chosen[list(positions)] = True
    return chosen
