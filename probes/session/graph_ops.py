"""How does a compiled graph of ours hand out values and gradients? By two operations, next to the nodes that make them.

``take`` reads a value when it is computed, and ``gradient`` its gradient in the backward. Both are opaque to the compiler,
write into nothing of the user's, and know by a ticket, a tensor of one number that is given to the graph, which call of which
model runs: one graph serves all calls and all blocks that share it.

The compiler's graph has the functions of torch as the user's code calls them, each of which runs one operation or several.
They are run once more on tensors without data, and what they run is compared with what ran in the forward that was read: where
a call of a module ran the same operations, the n-th one of it is at a known node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Report, call_safely, in_recomputation
from depthscope.probes.model.user_modes import AUTOCAST_DEVICES
from depthscope.probes.reading.graph import OUTPUT
from depthscope.probes.reading.known_operations import decomposed, operation_of

Receiver = Callable[[torch.Tensor, Callable[..., torch.Tensor]], None]
BEGIN = -1  # the place by which a graph tells which of its inputs is the ticket


class _StandIn(torch.autograd.Function):
    """A tensor in the place of a value of the compiled graph, whose hooks run when the gradient of that arrives."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_zeros(()), None


class RunningCall:
    """One call of a compiled graph of ours, and what is done with its values.

    ``receivers``: for each place ``receive(value, stand_in)``: the value, which lives on in the call alone, and a function
    that makes a tensor in its place, from numbers of its shape.
    ``listened``: the places whose values have a gradient.
    """

    def __init__(self, receivers: Sequence[Receiver], report: Report, listened: set[int]):
        self.ticket = next(_tickets)
        # Compiled code runs outside of the user's autocast, which tells in which type states are multiplied.
        self._autocast = [name for name in AUTOCAST_DEVICES if torch.is_autocast_enabled(name)]
        self._receivers, self._report, self.listened = receivers, report, listened
        self._stand_ins: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def open(self) -> torch.Tensor:
        """The ticket, with which the call is known until `remove`."""
        _running_calls[self.ticket] = self
        return torch.tensor([self.ticket])

    def remove(self) -> None:
        """Let go of the call: what its graph hands out from now on goes nowhere."""
        _running_calls.pop(self.ticket, None)
        self._stand_ins.clear()

    def take(self, place: int, value: torch.Tensor) -> None:
        """Hand a value to its receiver."""

        def stand_in(numbers: torch.Tensor | None = None) -> torch.Tensor:
            leaf = torch.zeros((), dtype=value.dtype, device=value.device).requires_grad_()
            shown = value.new_zeros(()).expand(value.shape) if numbers is None else numbers
            with torch.enable_grad():
                found = _StandIn.apply(leaf, shown)
            self._stand_ins.setdefault(place, []).append((found, leaf))
            return found

        off = [name for name in self._autocast if not torch.is_autocast_enabled(name)]
        for name in off:
            torch.set_autocast_enabled(name, True)
        try:
            call_safely(self._report, self._receivers[place], value, stand_in)
        finally:
            for name in off:
                torch.set_autocast_enabled(name, False)

    def receive(self, place: int, gradient: torch.Tensor) -> None:
        """Run the hooks of the tensors that stand for a value."""
        for found, leaf in self._stand_ins.get(place, ()):
            torch.autograd.grad(found, leaf, gradient, retain_graph=True)


_tickets = itertools.count()
_running_calls: dict[int, RunningCall] = {}


def _take(value: torch.Tensor, ticket: torch.Tensor, place: int) -> None:
    # A backward that runs a part of the graph once more has been through here already.
    call = None if place == BEGIN or in_recomputation() else _running_calls.get(int(ticket))
    if call is not None:
        call.take(place, value)


def _gradient(value: torch.Tensor, ticket: torch.Tensor, place: int) -> torch.Tensor:
    call = _running_calls.get(int(ticket))
    if call is not None:
        call.receive(place, value)
    return value.clone()


# As the schema tells, `take` writes into the ticket: so no compiler leaves it out, or changes the order of two of them.
_unsafe = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
take = torch.library.custom_op(
    "depthscope::take",
    _take,
    mutates_args=("ticket",),
    schema="(Tensor value, Tensor(a!) ticket, int place) -> ()",
    **_unsafe,
)
gradient = torch.library.custom_op(
    "depthscope::gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor value, Tensor ticket, int place) -> Tensor",
    **_unsafe,
)
take.register_fake(lambda value, ticket, place: None)
gradient.register_fake(lambda value, ticket, place: torch.empty_like(value))


_listened: list[set[int]] = []


@contextmanager
def noting(places: set[int]) -> Iterator[None]:
    """Note the places whose values turn out to have a gradient, while a graph is compiled."""
    _listened.append(places)
    try:
        yield
    finally:
        _listened.pop()


def listen(value: torch.Tensor, ticket: torch.Tensor, place: int) -> None:
    """Put ``gradient`` into the backward of a value; called by the compiler, while it derives the backward of a graph."""
    if value.requires_grad and torch.is_grad_enabled():
        if _listened:
            _listened[-1].add(place)
        else:  # a backend that runs the functions of the graph as they are
            call = _running_calls.get(int(ticket))
            if call is not None:
                call.listened.add(place)
        value.register_hook(lambda given: torch.ops.depthscope.gradient(given, ticket, place))


torch.fx.node.has_side_effect(listen)


class CallInRegion(NamedTuple):
    """A call inside of compiled code: the path from the compiled module on, and which of its calls there."""

    path: str
    number: int


class PlaceInRegion(NamedTuple):
    """Where a value is made: by which operation of which call (`OUTPUT`: what the call gives), and which result of it."""

    call: CallInRegion
    operation: int
    item: int


class _Operation(NamedTuple):
    """One operation that ran, on tensors without data."""

    func: Any
    args: Any
    kwargs: Any
    result: Any


@dataclass
class _Ran:
    """A node of the graph, and the operations that it ran.

    ``start``: how many ran before in its call; ``given``: what it takes, with the nodes that give it.
    """

    node: Any
    start: int
    operations: list[_Operation]
    given: list[tuple[Any, Any]]
    result: Any


class _Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[_Operation] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `GraphRecorder`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question for the device of a tensor without data
            return func(*args, **(kwargs or {}))
        if operation_of(func).is_composite:
            return decomposed(self, func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self.ran.append(_Operation(func, args, kwargs or {}, result))
        return result


def insert(
    graph_module: Any,
    wanted: Sequence[PlaceInRegion],
    operations: Mapping[CallInRegion, Sequence[Any]],
    paths: Mapping[int, str],
) -> None:
    """Let a graph hand out some values and their gradients, each under its number among those that are wanted.

    ``operations``: what ran in the calls of the forward that was read.
    ``paths``: of the modules inside of the compiled one, by identity.
    Raises CaptureError: Where the graph runs other operations.
    """
    graph = graph_module.graph
    (begin,) = (node for node in graph.nodes if _is_begin(node))
    ticket = begin.args[1]
    calls = _nodes_by_call(graph_module, begin, paths) if wanted else {}
    found = [_operation_at(place, calls, operations) for place in wanted]
    graph.erase_node(begin)
    expanded: dict[Any, list[Any]] = {}
    for number, ((ran, position), place) in enumerate(zip(found, wanted, strict=True)):
        if position == len(ran.operations) - 1 and ran.node not in expanded:
            shown, result = ran.node, ran.result
        else:
            if ran.node not in expanded:
                expanded[ran.node] = _Expansion(graph, ran).made
            shown, result = expanded[ran.node][position], ran.operations[position].result
        if isinstance(result, (tuple, list)):
            shown = _after(graph, shown, getitem, (shown, place.item))
        last = _after(graph, shown, listen, (shown, ticket, number))
        _after(graph, last, torch.ops.depthscope.take.default, (shown, ticket, number))
    for node in expanded:
        graph.erase_node(node)
    graph.lint()
    graph_module.recompile()


def _after(graph: Any, node: Any, function: Any, args: Any, kwargs: Any = None) -> Any:
    with graph.inserting_after(node):
        return graph.call_function(function, args, kwargs or {})


class _Expansion:
    """The operations that a function of torch is made of, in its place; autograd derives each of them either way."""

    def __init__(self, graph: Any, ran: _Ran):
        self._graph, self._last = graph, ran.node
        self._known = [(value, node) for value, node in ran.given]
        self._name = getattr(ran.node.target, "__name__", ran.node.target)
        self.made = [self._add(operation) for operation in ran.operations]
        ran.node.replace_all_uses_with(self._node_of(ran.result))

    def _add(self, operation: _Operation) -> Any:
        args, kwargs = tree_map(self._node_of, (tuple(operation.args), dict(operation.kwargs)))
        made = self._last = _after(self._graph, self._last, operation.func, args, kwargs)
        self._known.append((operation.result, made))
        if isinstance(operation.result, (tuple, list)):
            for item, part in enumerate(operation.result):
                self._last = _after(self._graph, self._last, getitem, (made, item))
                self._known.append((part, self._last))
        return made

    def _node_of(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, torch.Tensor):
            return value
        for known, node in self._known:
            if known is value:
                return node
        raise CaptureError(f"a value is made inside of {self._name}, one function of the compiled graph")

    def _size(self, size: torch.SymInt) -> Any:
        """A size that the compiler leaves open: a number all the same, or that of an axis of what is known."""
        number = size.node.maybe_as_int()
        if number is not None:
            return number
        tensors = [(value, node) for value, node in self._known if isinstance(value, torch.Tensor)]
        for tensor, node in tensors:
            for axis, own in enumerate(tensor.shape):
                if isinstance(own, torch.SymInt) and own.node.expr == size.node.expr:
                    found = _after(self._graph, node, torch.ops.aten.sym_size.int, (node, axis))
                    self._last = found if node is self._last else self._last
                    return found
        raise CaptureError(
            f"a value is made inside of {self._name}, whose sizes are symbols; compile with dynamic=False"
        )


def without_ticket(graph_module: Any) -> None:
    """Leave a graph as the user's code makes it."""
    for node in [node for node in graph_module.graph.nodes if _is_begin(node)]:
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def _is_begin(node: Any) -> bool:
    is_take = node.target in (torch.ops.depthscope.take, torch.ops.depthscope.take.default)
    return is_take and node.args[2] == BEGIN


def _nodes_by_call(graph_module: Any, begin: Any, paths: Mapping[int, str]) -> dict[CallInRegion, list[_Ran]]:
    """The nodes of each call with the operations that they run."""
    given = [node.meta.get("example_value") for node in graph_module.graph.nodes if node.op == "placeholder"]
    fake_modes = [value.fake_mode for value in given if isinstance(value, FakeTensor)]
    if not fake_modes:
        raise CaptureError("torch's compiler gave a graph without tensors")
    found: dict[CallInRegion, list[_Ran]] = {}
    noted = _Operations()

    class Interpreter(torch.fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            found = super().get_attr(target, args, kwargs)
            is_real = isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor)
            return fake_modes[0].from_tensor(found) if is_real else found

        def run_node(self, node: Any) -> Any:
            noted.ran = []
            given = [(self.env[of], of) for of in node.all_input_nodes]
            result = super().run_node(node)
            if node.op in ("call_function", "call_method") and node is not begin:
                of_call = found.setdefault(_call_of(node, paths), [])
                start = of_call[-1].start + len(of_call[-1].operations) if of_call else 0
                of_call.append(_Ran(node, start, noted.ran, given, result))
            return result

    with fake_modes[0], noted:
        Interpreter(graph_module, garbage_collect_values=False).run(*given)
    return found


def _call_of(node: Any, paths: Mapping[int, str]) -> CallInRegion:
    """The innermost call in which a node of the compiler's graph is."""
    stack = node.meta.get("nn_module_stack") or {}
    inside = [key for key in stack if paths.get(int(str(key).partition("@")[0])) is not None]
    if not inside:
        return CallInRegion("", 0)
    identity, _, number = str(inside[-1]).partition("@")
    return CallInRegion(paths[int(identity)], int(number or 0))


def _operation_at(
    place: PlaceInRegion,
    calls: Mapping[CallInRegion, list[_Ran]],
    operations: Mapping[CallInRegion, Sequence[Any]],
) -> tuple[_Ran, int]:
    """The node that makes a value, and which of the operations that it runs does."""
    ran = calls.get(place.call, [])
    where = place.call.path or "the compiled module"
    if not ran:
        raise CaptureError(
            f"no operation of {where} is in the first graph of its compiled code: a graph break comes before it, or it is "
            "in a checkpoint that is compiled with it"
        )
    if place.operation == OUTPUT:
        return ran[-1], len(ran[-1].operations) - 1
    known = [operation.func for of in ran for operation in of.operations]
    if known != list(operations[place.call]):
        raise CaptureError(f"{where} runs other operations: {_difference(known, operations[place.call])}")
    (of,) = (r for r in ran if r.start <= place.operation < r.start + len(r.operations))
    return of, place.operation - of.start


def _difference(compiled: Sequence[Any], uncompiled: Sequence[Any]) -> str:
    """Where two sequences of operations part."""
    at = next(
        (n for n, (one, other) in enumerate(zip(compiled, uncompiled, strict=False)) if one != other), None
    )
    at = min(len(compiled), len(uncompiled)) if at is None else at
    names = [operation_of(of[at]).name if at < len(of) else "none" for of in (compiled, uncompiled)]
    return (
        f"{len(compiled)} compiled and {len(uncompiled)} uncompiled, of which number {at} is {names[0]} compiled and "
        f"{names[1]} uncompiled"
    )
