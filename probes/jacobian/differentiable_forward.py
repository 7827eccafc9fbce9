"""How do we get states with the graph between them? One forward with constant weights; the model is unchanged afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.hooks import in_recomputation
from depthscope.probes.model.preserved_state import eager, preserved_state
from depthscope.probes.model.tensors import floats_in, version
from depthscope.probes.reading.graph import Graph, TracedValue, ValuePlace
from depthscope.probes.reading.operations import is_read_early, is_view
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.reading.recording import recording
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model
from depthscope.probes.structure.chain import Chain

Meet: TypeAlias = Callable[[int, int, torch.Tensor], torch.Tensor]  # with the depth and the stream
Shown: TypeAlias = dict[tuple[int, int], int]  # depths, by a call of a module and which of its tensors

# The depths, and the streams, that are made there
_Places: TypeAlias = dict[ValuePlace, list[tuple[int, int]]]
_Seen: TypeAlias = dict[tuple[int, int], tuple[torch.Tensor, int | None]]

OPERATION = "operation"  # that alone shows a state

SECOND = (
    "an operation of this model has no second derivative, which products with J need (those with Jᵀ do not); load the model "
    "with attn_implementation='eager' or without custom kernels"
)
UNLINKED = "not to have been used in the graph"
# By words of torch's own messages, which have no classes of their own.
EXPLANATIONS = {
    "modified by an inplace operation": "a weight or a state was rewritten since the Jacobian's forward; take the Jacobian "
    "again after every change of the weights",
    "is not implemented": SECOND,
    "does not require grad": SECOND,
    UNLINKED: "the later state does not depend on the earlier one: some block between them is "
    "skipped or runs without gradients",
    "leaf Variable that requires grad is being used in an in-place": "the model rewrites a state in place outside its "
    "blocks; name the modules that take and return complete states with layers=",
    "checkpoint": "activation checkpointing recomputes blocks without the hooks of this measurement; turn it off, for "
    "example with model.gradient_checkpointing_disable() or model.eval()",
}


class JacobianError(InputError):
    """A Jacobian that cannot be had."""


class StartError(JacobianError):
    """A state at which no graph can begin."""


@dataclass(frozen=True, eq=False)
class State:
    """A state with its graph.

    ``tensors``: that the model goes on with: one, or one for each stream.
    ``value``: that tensor, or all streams along a new first axis.
    """

    tensors: tuple[torch.Tensor, ...]
    value: torch.Tensor

    @classmethod
    def of(cls, *tensors: torch.Tensor) -> State:
        """The state that some tensors are."""
        return cls(tensors, tensors[0] if len(tensors) == 1 else torch.stack(tensors))


def gradients(
    outputs: Sequence[State], inputs: Sequence[State], cotangents: Sequence[torch.Tensor], **options: Any
) -> list[torch.Tensor | None]:
    """Gradients in the form of ``value``; None for what nothing links, which torch refuses without ``allow_unused``."""
    tensors = [tensor for state in inputs for tensor in state.tensors]
    unused = options.pop("allow_unused", False)
    several = {"allow_unused": unused or len(tensors) > len(inputs)}
    found = iter(torch.autograd.grad([of.value for of in outputs], tensors, cotangents, **several, **options))
    joined: list[torch.Tensor | None] = []
    for state in inputs:
        parts = [(tensor, next(found)) for tensor in state.tensors]
        if all(gradient is None for _, gradient in parts):
            if not unused:
                raise JacobianError(EXPLANATIONS[UNLINKED])
            joined.append(None)
        else:
            joined.append(State.of(*(torch.zeros_like(t) if g is None else g for t, g in parts)).value)
    return joined


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors into advice."""
    try:
        yield
    except RuntimeError as error:
        for sign, advice in EXPLANATIONS.items():
            if sign in str(error):
                raise JacobianError(f"{advice} (torch: {str(error).splitlines()[0][:200]})") from error
        raise


def differentiable_states(
    model: nn.Module, batch: Any, chain: Chain, start: int, stop: int
) -> tuple[dict[int, State], Sequence[TracedValue]]:
    """States by depth, from a forward that begins its graph at start and ends it at stop.

    ``model``: the model; its weights are constants meanwhile, and it is as before afterwards.
    Returns: In the model's layout, with the graph between them.
    Returns: The views that make the state at start of the tensor that is given for it; none where that is the state itself.
    """
    views: Sequence[TracedValue] = ()
    seen: _Seen = {}  # by depth and stream, and how often it was written by then

    def see(depth: int, stream: int, tensor: torch.Tensor) -> torch.Tensor:
        if (depth, stream) not in seen:
            seen[depth, stream] = tensor, version(tensor)
        return tensor

    def meet(depth: int, stream: int, state: torch.Tensor) -> torch.Tensor:
        if depth == start and not state.requires_grad:
            # The tensor itself and not a copy: other references to it, such as a skip around the block, count too.
            state.requires_grad_()
        see(depth, stream, state)
        # Copies, since a block may write into its input in place; and no graph after the last state, to save memory.
        return state.detach().clone() if depth == stop else state.clone()

    with (
        preserved_state(model),
        constant_weights(model),
        eager(),
        # The fused kernels have no second derivative, which products with J need.
        sdpa_kernel(SDPBackend.MATH),
        torch.inference_mode(False),  # inference tensors record no graph even where gradients are on
        torch.enable_grad(),
        ExitStack() as stack,
        explained(),
        own_call(seen),  # no recorder that is on may count it
    ):
        depths = range(start, stop + 1)
        recorder = GraphRecorder(model, (), holds=False)
        places: _Places = {}
        if any(chain.points[depth].streams for depth in depths) or chain.points[start].at == OPERATION:
            before = GraphRecorder(model, (), holds=False)
            with preserved_state(model), torch.no_grad(), recording(before):
                call_model(model, _aliased(batch))
            views = _find_places(places, before.graph, chain, start, stop)
        else:
            _find_places(places, None, chain, start, stop)
        _Operations(recorder, places, start, see)
        _hook_states(stack, model, chain, depths, meet)
        recorded = bool(places)
        with recording(recorder) if recorded else nullcontext():
            output = call_model(model, _aliased(batch))
        recorder.end(output if recorded else None)
        states = _linked_states(chain, seen, start, stop, recorder)
    _require_no_recomputation(model, states[start], states[stop])
    return states, views


def _always(tensor: torch.Tensor, value: TracedValue) -> torch.Tensor:
    return tensor


def viewed(tensor: torch.Tensor, views: Sequence[TracedValue]) -> torch.Tensor:
    """Some recorded views, one after another, of a tensor."""
    for view in views:
        tensor = Graph.run(view, partial(_always, tensor))
    return tensor


def _linked_states(
    chain: Chain, seen: _Seen, start: int, stop: int, recorder: GraphRecorder
) -> dict[int, State]:
    """The states that were seen; none between the two that are asked for that cannot be used.

    Raises JacobianError: Where one of these two did not show, was rewritten, or no graph links them.
    """
    states: dict[int, State] = {}
    for depth in range(start, stop + 1):
        place = chain.points[depth]
        count, between = len(place.streams) or 1, start < depth < stop
        tensors = [seen[depth, stream][0] for stream in range(count) if (depth, stream) in seen]
        if len(tensors) < count:
            if between and place.streams:
                continue
            raise JacobianError(f"depth {depth} did not show: {place.at} of {place.path!r} did not run again")
        # torch counts the writes into a tensor: one after it passed changed the value that the graph was recorded with.
        rewritten = any(version(tensor) != seen[depth, n][1] for n, tensor in enumerate(tensors))
        if between and ((rewritten and place.at == OPERATION) or is_mixed(recorder, tensors)):
            continue  # it was not copied as it passed, and is between the two that are asked for
        if rewritten:
            raise JacobianError(
                f"the state at depth {depth} ({place.at} of {place.path!r}) was rewritten in place outside its block; "
                "choose other depths"
            )
        if not any(tensor.requires_grad for tensor in tensors):
            raise JacobianError(
                f"the state at depth {depth} carries no gradient from depth {start}: a block before it runs under no_grad, on "
                "integers, or in a reentrant checkpoint; turn that off, or choose depths on one side of it"
            )
        if (
            depth == start
            and count > 1
            and is_read_early(recorder.graph, [recorder.known(t) for t in tensors])
        ):
            raise StartError(
                f"a stream of the state at depth {depth} is read before the others are made, by what is not a part of this "
                "state; choose another depth"
            )
        states[depth] = State.of(*tensors)
    return states


def is_mixed(recorder: GraphRecorder, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one stream of a state was computed from another one: a gradient there would count both ways."""
    values = [recorder.known(tensor) for tensor in tensors] if len(tensors) > 1 else []
    return any(
        recorder.graph.depends(a, b) for m, a in enumerate(values) for n, b in enumerate(values) if m != n
    )


def _require_no_recomputation(model: nn.Module, source: State, target: State) -> None:
    """Refuse a graph that is recomputed (activation checkpointing).

    The recomputation runs without this module's hooks, so another function would be differentiated. One backward shows it.
    """
    recomputed: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: recomputed.append(name) if in_recomputation() else None

    with ExitStack() as stack, explained():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(note(name)).remove)
        # Any cotangent will do: only what runs in the backward is looked at.
        gradients([target], [source], [torch.ones_like(target.value)], retain_graph=True)
    if recomputed:
        raise JacobianError(f"the backward ran {recomputed[0]!r} again: {EXPLANATIONS['checkpoint']}")


class _Operations:
    """The states that operations alone show, of a forward that is recorded.

    ``start``: the depth of the state at which the graph begins: with the last of its tensors.
    """

    def __init__(self, recorder: GraphRecorder, places: _Places, start: int, see: Meet):
        self._recorder, self._places, self._start, self._see = recorder, places, start, see
        self._also = recorder.on_taken
        self._count = len({stream for of in places.values() for depth, stream in of if depth == start})
        self._begins: dict[int, torch.Tensor] = {}
        if places:
            recorder.on_value, recorder.on_taken = self._made, self._taken

    def _made(self, value: TracedValue, tensor: torch.Tensor) -> None:
        for depth, stream in self._places.get(self._recorder.graph.place(value), ()):
            if depth == self._start:
                self._begins[stream] = tensor
                for begin in self._begins.values() if len(self._begins) == self._count else ():
                    begin.requires_grad_()

    def _taken(self, value: TracedValue, tensor: torch.Tensor) -> None:
        if self._also is not None:
            self._also(value, tensor)
        for depth, stream in self._places.get(self._recorder.graph.place(value), ()):
            self._see(depth, stream, tensor)


def _find_places(
    places: _Places, graph: Graph | None, chain: Chain, start: int, stop: int
) -> Sequence[TracedValue]:
    """Find where the states are made that operations alone show, or whose streams are tensors of their own.

    ``graph``: of a forward, where such a state is at start or has several tensors.
    Returns: The views that make the state at start of the tensor in whose memory it lies.
    """
    views: Sequence[TracedValue] = ()
    for depth in range(start, stop + 1):
        point = chain.points[depth]
        if point.streams:
            assert graph is not None
            made = [value for of in point.streams if (value := of.value_in(graph)) is not None and value.func]
            # A tensor that is several streams has one gradient for all of them.
            apart = len(made) == len(point.streams) and (depth == stop or len(set(made)) == len(made))
            # Torch refuses to begin a graph with a view
            if depth == start and not (apart and not any(map(is_view, made))):
                raise StartError(
                    f"the state at depth {depth} is held by {len(point.streams)} tensors, one for each stream, of which one "
                    "is part of another tensor, several streams at once, or given to the model; choose another depth"
                )
            for stream, value in enumerate(made if apart else ()):
                places.setdefault(graph.place(value), []).append((depth, stream))
        elif point.at == OPERATION:
            place = point.place
            if depth == start:
                assert graph is not None
                first, *views = _views_of_memory(graph, place, start)
                place = graph.place(first)
            places.setdefault(place, []).append((depth, 0))
    return views


def _views_of_memory(graph: Graph, place: ValuePlace, depth: int) -> list[TracedValue]:
    """What made the memory of the state at a place, and the views that make the state of it."""
    value = graph.at(place)
    chain = [] if value is None else [value]
    while chain and chain[0].alias:
        chain.insert(0, chain[0].parents[0])
    if not chain or chain[0].func is None or chain[0].numel != chain[-1].numel:
        raise StartError(
            f"the state at depth {depth} is a part of what {place.module or 'the model'} makes; choose another depth"
        )
    return chain


def _hook_states(stack: ExitStack, model: nn.Module, chain: Chain, depths: range, meet: Meet) -> None:
    """Call ``meet`` with every state of the chain that a call shows; the model goes on with what it returns."""
    modules = dict(model.named_modules(remove_duplicate=False))  # a shared block has several paths
    wanted: dict[tuple[str, str], Shown] = {}
    for depth in depths:
        place = chain.points[depth]
        if place.at != OPERATION and not place.streams:
            wanted.setdefault((place.path, place.at), {})[place.index, place.item] = depth
    for (path, at), shown in wanted.items():
        if at == "input":
            hook = modules[path].register_forward_pre_hook(_input_hook(shown, meet), with_kwargs=True)
        else:
            hook = modules[path].register_forward_hook(_output_hook(shown, meet))
        stack.callback(hook.remove)


def _input_hook(shown: Shown, meet: Meet) -> Callable[..., Any]:
    turn = count()  # one module may be called several times in a forward

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replaced((args, kwargs), _met(shown, next(turn), floats_in(args, kwargs), meet))

    return hook


def _output_hook(shown: Shown, meet: Meet) -> Callable[..., Any]:
    turn = count()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return replaced(output, _met(shown, next(turn), floats_in(output), meet))

    return hook


def _met(shown: Shown, turn: int, tensors: Sequence[torch.Tensor], meet: Meet) -> dict[int, torch.Tensor]:
    """What the model goes on with in the place of the states among some tensors, by their identity."""
    depths = ((shown.get((turn, item)), tensor) for item, tensor in enumerate(tensors))
    return {id(tensor): meet(depth, 0, tensor) for depth, tensor in depths if depth is not None}


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """No graph through the weights: it needs less memory, and no gradient can reach them."""
    # torch refuses to change the flag of a tensor that is no leaf.
    weights = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _aliased(batch: Any) -> Any:
    """The batch with its own view of every floating tensor, since one of them may be the first state."""
    if isinstance(batch, torch.Tensor):
        if not batch.is_floating_point():
            return batch
        # A view of an inference tensor is one too, and records no graph.
        return batch.clone() if batch.is_inference() else batch.detach()
    if isinstance(batch, Mapping):
        return {name: _aliased(value) for name, value in batch.items()}
    # Of exactly these types: a named tuple takes its items one by one.
    return type(batch)(_aliased(value) for value in batch) if type(batch) in (tuple, list) else batch


def replaced(value: Any, changes: Mapping[int, torch.Tensor]) -> Any:
    """Nested tuples, lists, dicts and model outputs with some tensors exchanged.

    ``changes``: new tensors by the ``id`` of the old ones.
    Returns: A shallow copy; the containers that came are unchanged.
    """
    if isinstance(value, torch.Tensor):
        return changes.get(id(value), value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # a model output has its own class
        for name, item in value.items():
            changed[name] = replaced(item, changes)
        return changed
    if isinstance(value, (tuple, list)):
        items = [replaced(item, changes) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
