"""The graph between the states of one forward: weights constant, hooks gone, the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from probes.capture import call, eager, raise_first
from probes.chain import Chain, version
from probes.hooks import first_float, in_recomputation, untouched
from probes.inputs import Mask
from probes.layout import canonical
from probes.routing import constant_routing, replaced
from probes.session import Forward, RewrittenError, Session, Settings

Tokens: TypeAlias = Literal["own", "all"]
Routing: TypeAlias = Literal["full", "frozen"]
Meet: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]

EXPLANATIONS = {
    "modified by an inplace operation": "a weight or a state was rewritten since the Jacobian's forward; take the Jacobian "
    "again after every change of the weights",
    "is not implemented": "an operation of this model has no second derivative, which products with J need (those with Jᵀ "
    "do not); load the model with attn_implementation='eager' or without custom kernels",
    "does not require grad": "the product does not depend on the state; some block runs without gradients",
    "not to have been used in the graph": "the later state does not depend on the earlier one; some block between them is "
    "skipped or runs without gradients",
    "leaf Variable that requires grad is being used in an in-place": "the model rewrites the state at start in place "
    "outside its blocks; start at another depth",
    "checkpoint": "activation checkpointing recomputes blocks without the hooks of this measurement; turn it off, for "
    "example with model.gradient_checkpointing_disable() or model.eval()",
}


class JacobianError(ValueError):
    """A Jacobian that cannot be had."""


@dataclass(frozen=True)
class Selection:
    """Which chain to read, which of its tokens, and what counts as constant; as in `probes.jacobian.jacobian`."""

    layers: str | Sequence[str] | None = None
    layout: str | None = None
    streams: int | None = None
    mask: Mask = None
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
    """Flat positions of the kept tokens' entries in a state, (P, N, D), and each token's group, (P,)."""

    slots: torch.Tensor
    group: torch.Tensor

    def groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For every group its positions in the packed vector and in the flat state."""
        flat = self.slots.flatten()
        of_entry = self.group.repeat_interleave(self.slots[0].numel())
        members = [(of_entry == number).nonzero().squeeze(-1) for number in range(int(self.group.max()) + 1)]
        return [(member, flat[member]) for member in members]


@dataclass(frozen=True, eq=False)
class StateGraph:
    """The states of one forward from start to stop, with the graph between them, and how to read them."""

    start: int
    stop: int
    states: dict[int, torch.Tensor]
    mask: torch.Tensor | None
    layout: str
    batch_size: int
    num_streams: int
    selection: Selection

    def entries(self, start: int, stop: int) -> tuple[Entries, Entries]:
        """Entries of the kept tokens at two depths.

        Parameters
        ----------
        start, stop : int
            Depths that were recorded.

        Returns
        -------
        source, target : Entries
            In groups that move and see each other: all tokens, or the k-th kept token of every sequence.

        Raises
        ------
        JacobianError
            Where the tokens of the two depths differ but must not, or none is left.
        """
        source, target = self._positions(start), self._positions(stop)
        tied = self.selection.tokens == "own" or self.mask is not None or self.selection.positions is not None
        if tied and source.shape[:2] != target.shape[:2]:
            raise JacobianError(
                f"the states at depths {start} and {stop} have {source.shape[1]} and {target.shape[1]} tokens; one token's "
                "own Jacobian, masks and positions need the same tokens: take tokens='all', or depths of one stage"
            )
        return self._kept(source), self._kept(target)

    def _positions(self, depth: int) -> torch.Tensor:
        """Flat positions of a state's entries, (B, T, N, D)."""
        state = self.states[depth]
        numbers = torch.arange(state.numel(), device=state.device).reshape(state.shape)
        return canonical(numbers, self.layout, batch_size=self.batch_size, num_streams=self.num_streams)

    def _kept(self, positions: torch.Tensor) -> Entries:
        kept = torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
        if self.mask is not None:
            kept &= self.mask.to(kept.device)
        if self.selection.positions is not None:
            kept &= _chosen(self.selection.positions, kept.shape[1]).to(kept.device)
        if not kept.any():
            raise JacobianError("the mask and positions= leave no real token; expected at least one")
        order = kept.long().cumsum(1)[kept] - 1
        return Entries(positions[kept], order if self.selection.tokens == "own" else torch.zeros_like(order))


def state_graph(
    model: nn.Module, batch: Any, start: int, stop: int | None, selection: Selection
) -> StateGraph:
    """Run the model twice, once to find its chain and once to keep the graph from start to stop.

    Parameters
    ----------
    model : Module
        The model.
    batch : mapping, tensor or tuple
        One batch.
    start, stop : int
        Depths; None for the last one.
    selection : Selection
        What to read.

    Returns
    -------
    StateGraph

    Raises
    ------
    JacobianError
        Where the depths are unknown or nothing links them.
    """
    _require_readable(model, batch, selection)
    session, forward = _discovered(model, batch, selection)
    number = _chain_number(session.chains, selection.chain)
    first, last = _depths(session.chains[number], start, stop)
    frozen = selection.routing == "frozen" and number == 0  # only the first chain has connections
    routing = constant_routing(session, first, last) if frozen else nullcontext()
    with routing:
        states = _recorded(model, batch, session.chains[number], first, last)
    return StateGraph(
        start=first,
        stop=last,
        states=states,
        mask=forward.masks.get(number),
        layout=session.layouts[number],
        batch_size=forward.batch_size,
        num_streams=session.num_streams,
        selection=selection,
    )


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where torch says what it cannot do."""
    try:
        yield
    except RuntimeError as error:
        for sign, advice in EXPLANATIONS.items():
            if sign in str(error):
                raise JacobianError(f"{advice} (torch: {str(error).splitlines()[0][:200]})") from error
        raise


def _require_readable(model: nn.Module, batch: Any, selection: Selection) -> None:
    if not isinstance(batch, (Mapping, torch.Tensor, tuple)):
        raise JacobianError(
            f"a batch of type {type(batch).__name__} came; expected one mapping, tensor or tuple"
        )
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


def _discovered(model: nn.Module, batch: Any, selection: Selection) -> tuple[Session, Forward]:
    """Find the chains in a forward of its own, without gradients."""
    layers = selection.layers
    named = None if layers is None else ((layers,) if isinstance(layers, str) else tuple(layers))
    session = Session(
        model,
        Settings(
            layers=named,
            layout=selection.layout,
            streams=selection.streams,
            mask=selection.mask,
            max_sequences=1,
        ),
    )
    session.attach()
    try:
        with untouched(model), eager(), torch.no_grad():
            call(model, batch)
            if any(isinstance(error, RewrittenError) for error in session.errors):
                session.errors.clear()
                call(model, batch)  # now the places are known, and states are copied as they pass
        raise_first(session)
        assert session.last is not None
        return session, session.last
    finally:
        session.detach()


def _chain_number(chains: Sequence[Chain], name: str | None) -> int:
    names = [chain.name for chain in chains]
    if name is None:
        return 0
    if name not in names:
        raise JacobianError(f"no chain {name!r}; the model has {', '.join(map(repr, names))}")
    return names.index(name)


def _depths(chain: Chain, start: int, stop: int | None) -> tuple[int, int]:
    deepest = len(chain.places) - 1
    stop = deepest if stop is None else stop
    for name, depth in (("start", start), ("stop", stop)):
        if not 0 <= depth <= deepest:
            raise JacobianError(f"{name} is {depth}; the chain has depths 0 (embedding) … {deepest}")
    if start >= stop:
        raise JacobianError(
            f"start is {start} and stop is {stop}; expected start < stop, since a later state moves no earlier one"
        )
    return start, stop


def _chosen(positions: Sequence[int], num_tokens: int) -> torch.Tensor:
    outside = [position for position in positions if not 0 <= position < num_tokens]
    if outside:
        raise JacobianError(
            f"positions has {outside[0]}; the states have token positions 0 … {num_tokens - 1}"
        )
    chosen = torch.zeros(num_tokens, dtype=torch.bool)
    chosen[list(positions)] = True
    return chosen


# --- the forward whose graph is kept ---


def _recorded(model: nn.Module, batch: Any, chain: Chain, start: int, stop: int) -> dict[int, torch.Tensor]:
    """States by depth, from a forward that begins its graph at start and ends it at stop."""
    states: dict[int, torch.Tensor] = {}
    versions: dict[int, int | None] = {}

    def meet(depth: int, state: torch.Tensor) -> torch.Tensor:
        if depth == start and not state.requires_grad:
            state.requires_grad_()  # the tensor itself, so that whoever else holds it is differentiated too
        states[depth], versions[depth] = state, version(state)
        return (
            state.detach().clone() if depth == stop else state.clone()
        )  # a block may write into what it gets

    with (
        untouched(model),
        _constant_weights(model),
        eager(),
        sdpa_kernel(SDPBackend.MATH),
        torch.inference_mode(False),
        torch.enable_grad(),
        ExitStack() as stack,
        explained(),
    ):
        _own_buffers(model)
        _watch(stack, model, chain, range(start, stop + 1), meet)
        call(model, _aliases(batch))
    _require_linked(chain, states, versions, start, stop)
    _require_kept(model, states[start], states[stop])
    return states


def _require_linked(
    chain: Chain,
    states: dict[int, torch.Tensor],
    versions: dict[int, int | None],
    start: int,
    stop: int,
) -> None:
    for depth in range(start, stop + 1):
        place = chain.places[depth]
        if depth not in states:
            raise JacobianError(f"depth {depth} did not show: {place.at} of {place.path!r} did not run again")
        if version(states[depth]) != versions[depth]:
            raise JacobianError(
                f"the state at depth {depth} ({place.at} of {place.path!r}) was rewritten in place outside its block; "
                "choose other depths"
            )
        if not states[depth].requires_grad:
            raise JacobianError(
                f"the state at depth {depth} carries no gradient from depth {start}: a block before it runs under no_grad, on "
                "integers, or in a reentrant checkpoint; turn that off, or choose depths on one side of it"
            )


def _require_kept(model: nn.Module, source: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse a graph that is recomputed: without this module's hooks, another function would be differentiated."""
    recomputed: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: recomputed.append(name) if in_recomputation() else None

    with ExitStack() as stack, explained():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(note(name)).remove)
        torch.autograd.grad(target, source, torch.ones_like(target), retain_graph=True)
    if recomputed:
        raise JacobianError(f"the backward ran {recomputed[0]!r} again: {EXPLANATIONS['checkpoint']}")


def _watch(stack: ExitStack, model: nn.Module, chain: Chain, depths: Sequence[int], meet: Meet) -> None:
    """Hand every state of the chain to ``meet`` as it passes, and what that returns on to the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[tuple[str, str], dict[int, int]] = {}
    for depth in depths:
        place = chain.places[depth]
        wanted.setdefault((place.path, place.at), {})[place.index] = depth
    for (path, at), calls in wanted.items():
        module = modules[path]
        if at == "input":
            handle = module.register_forward_pre_hook(_before(calls, meet), with_kwargs=True)
        else:
            handle = module.register_forward_hook(_after(calls, meet))
        stack.callback(handle.remove)


def _before(calls: dict[int, int], meet: Meet) -> Callable[..., Any]:
    turn = count()

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        depth, state = calls.get(next(turn)), first_float(args, kwargs)
        if depth is None or state is None:
            return None
        return replaced((args, kwargs), {id(state): meet(depth, state)})

    return hook


def _after(calls: dict[int, int], meet: Meet) -> Callable[..., Any]:
    turn = count()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        depth, state = calls.get(next(turn)), first_float(output)
        if depth is None or state is None:
            return None
        return replaced(output, {id(state): meet(depth, state)})

    return hook


@contextmanager
def _constant_weights(model: nn.Module) -> Iterator[None]:
    """No graph through the weights: it holds less, and no gradient can reach them."""
    weights = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _own_buffers(model: nn.Module) -> None:
    """Buffers that this forward may write and its graph may keep; `untouched` puts the model's own back."""
    copies: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())


def _aliases(batch: Any) -> Any:
    """The batch with its own view of every floating tensor, since one of them may be the first state."""
    if isinstance(batch, torch.Tensor):
        if not batch.is_floating_point():
            return batch
        return batch.clone() if batch.is_inference() else batch.detach()
    if isinstance(batch, Mapping):
        return {name: _aliases(value) for name, value in batch.items()}
    return type(batch)(_aliases(value) for value in batch) if type(batch) in (tuple, list) else batch
