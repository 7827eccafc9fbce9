"""How is one forward recorded? Every operation below autograd becomes a value; writes in place become new values.

Tensors are held only where carried steps may be run again, and only what cannot be made again: of what sums, products and
joins take, that which other operations made, as a layer of a branch or the function of a coefficient. What a linear layer
or a norm takes and gives inside of a branch is let go with the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as hooked
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.operations import Listener
from depthscope.probes.model.tensors import floats_in
from depthscope.probes.reading.graph import (
    CONSTANT,
    FILLS,
    INPUT,
    LEAF,
    PARAMETER,
    SHAPE_ONLY,
    Graph,
    ModuleCall,
    Shown,
    TracedValue,
    dropped,
    geometry,
    no_collection,
    patched,
)
from depthscope.probes.reading.operations import (
    BATCH_NORMS,
    FUNCTIONS,
    JOINS,
    MATRICES,
    MOST_STREAMS,
    MOVES,
    NORMS,
    PRODUCTS,
    REDUCES,
    SAME,
    SCATTERS,
    SUMS,
)  # fmt: skip

# Sums with a product in one operation, and the product alone.
FUSED = {
    "addmm": torch.ops.aten.mm.default,
    "baddbmm": torch.ops.aten.bmm.default,
    "addcmul": torch.ops.aten.mul.Tensor,
}
# What carries a memory: what it takes is held, and what it gives is made again from that.
CARRYING = SAME | MOVES | REDUCES | JOINS | {*SUMS, *SCATTERS, *PRODUCTS, *MATRICES, *FUSED}

# Of what these take autograd saves each tensor, where all of them need gradients.
SAVING = NORMS | MATRICES.keys() | PRODUCTS.keys()


# An operation, what it takes with values for tensors, these values, and what it writes into.
_Taken = tuple["Operation", Any, Any, list[TracedValue], Any]


class _Entry(weakref.ref):
    """The value that a tensor has, and how many writes into its memory it knows of."""

    __slots__ = ("value", "writes")

    value: TracedValue
    writes: int


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own, as a wrapper's
        return id(tensor)


class GraphRecorder(TorchDispatchMode):
    """The values of a forward, as long as it is on.

    ``holds``: whether tensors are held, so that what is carried can be run again.
    """

    def __init__(self, model: nn.Module, batch: Sequence[torch.Tensor], *, holds: bool = True):
        super().__init__()
        self._holds = holds
        self.graph = Graph()
        self._given = {id(tensor) for tensor in batch}
        self.paths: dict[int, str] = {}  # of modules
        self._names: dict[int, str] = {}  # of parameters
        for path, module in model.named_modules():
            self.paths[id(module)] = path
            self.graph.modules[path] = type(module).__name__
            for name, parameter in module._parameters.items():
                self._names[id(parameter)] = f"{path}.{name}" if path else name
        self._numbered = {path for path in self.graph.modules if path.rpartition(".")[2].isdigit()}
        self._stack = [-1]
        self._num_shown = 0
        self._calls: dict[str, int] = {}
        self._orders: dict[tuple[int, str], int] = {}
        self._entries: dict[int, _Entry] = {}
        self._newly_held: list[TracedValue] = []
        self._held: dict[int, list[TracedValue]] = {}  # by the memory that they share
        self._writes: dict[int, list[tuple[TracedValue, tuple[Any, ...]]]] = {}
        self._alive: list[
            torch.Tensor
        ] = []  # memory that was written, so that its address is not given twice
        self._layer: list[TracedValue] | None = None  # what the layer takes that is running
        self._silent = False
        # Called with every value that an operation takes or a module shows, and its tensor, which has a graph by then.
        self.on_taken: Callable[[TracedValue, torch.Tensor], None] | None = None
        # Called with every value and its tensor when it is made.
        self.on_value: Callable[[TracedValue, torch.Tensor], None] | None = None
        # Called with every operation, after what it made was noted.
        self.listeners: list[Listener] = []

    def __enter__(self) -> GraphRecorder:
        self._paused = no_collection()
        self._paused.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._paused.__exit__(None, None, None)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every call of the method below; nothing of it is compiled anyway

    def enter(
        self, path: str, kind: str, tensors: Sequence[torch.Tensor] = (), module: nn.Module | None = None
    ) -> list[int]:
        """Note that a module is called with some tensors; the numbers of their values. A linear layer is one operation."""
        index = self._calls[path] = self._calls.get(path, -1) + 1
        self.graph.calls.append(ModuleCall(path, index, self._stack[-1], kind))
        self._stack.append(len(self.graph.calls) - 1)
        if type(module) is nn.Linear and len(tensors) == 1 and _is_closed(module) and _is_alone():
            given = (tensors[0], module.weight, *(() if module.bias is None else (module.bias,)))
            self._layer = [self.value_of(tensor) for tensor in given]
            self._off = torch._C._DisableTorchDispatch()
            self._off.__enter__()
        return self._show("input", tensors)

    def leave(self, path: str, output: Any, tensors: Sequence[torch.Tensor] = ()) -> list[int]:
        """Note that the innermost call has ended, and what it hands on; the numbers of these values."""
        if self._layer is not None:
            self._off.__exit__(None, None, None)
            given, self._layer = self._layer, None
            if isinstance(output, torch.Tensor):
                self.note(LINEAR, given, {}, given, None, output)
        numbers = self._show("output", tensors)
        if path in self._numbered:
            self.graph.handed_on |= {self.value_of(tensor).number for tensor in tensors_of(output)}
        self._stack.pop()
        return numbers

    def _show(self, at: str, tensors: Sequence[torch.Tensor]) -> list[int]:
        numbers = [self.value_of(tensor).number for tensor in tensors]
        for item, number in enumerate(numbers):
            self._num_shown += 1
            self.graph.shown.setdefault(number, []).append(Shown(self._stack[-1], at, item, self._num_shown))
        return numbers

    def end(self, output: Any) -> Graph:
        """The graph of the forward that returned this output."""
        self.graph.outputs = [self.value_of(tensor) for tensor in tensors_of(output)]
        return self.graph

    @property
    def path(self) -> str:
        """The module whose call is running; that of the model is empty."""
        return self.graph.calls[self._stack[-1]].path

    def value_of(self, tensor: torch.Tensor) -> TracedValue:
        """The value that a tensor has now, as it is taken."""
        value = self.known(tensor)
        if self.on_taken is not None:
            self.on_taken(value, tensor)
        return value

    def known(self, tensor: torch.Tensor) -> TracedValue:
        """The value that a tensor has now."""
        entry = self._entries.get(id(tensor))
        if entry is not None and entry() is not tensor:  # of a tensor that is gone
            entry = None
        return self._current(tensor, entry) if entry is None or self._writes else entry.value

    def _current(self, tensor: torch.Tensor, entry: _Entry | None) -> TracedValue:
        """The value of a tensor that was not met before, or whose memory may have been written."""
        writes = self._writes.get(_storage(tensor), ()) if self._writes else ()
        if entry is None:
            value = self._leaf(tensor)
            if not writes:
                return value
            entry = self._entries[id(tensor)]
            entry.writes = 0
        if entry.writes < len(writes):
            self._rewritten(entry, tensor, writes)
        return entry.value

    def _leaf(self, tensor: torch.Tensor) -> TracedValue:
        value = self._new(LEAF, None, (), {}, (), tensor)
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._names:
            value.kind = PARAMETER
            self.graph.parameter_names[value.number] = self._names.get(id(tensor), "")
        else:
            value.kind = INPUT if id(tensor) in self._given else CONSTANT
        self.enter_value(tensor, value)
        self._hold(tensor, value)
        value.of_parameter = value.kind == PARAMETER
        return value

    def _rewritten(
        self, entry: _Entry, tensor: torch.Tensor, writes: Sequence[tuple[TracedValue, tuple]]
    ) -> None:
        own = geometry(tensor)
        for new, where in writes[entry.writes :]:
            if new is entry.value:
                continue
            if where == own:
                entry.value = new
                continue
            old = entry.value
            entry.value = self._new("patch", patched, (old, new, own, where), {}, (old, new), tensor)
            entry.value.geometry = own
            entry.value.remade = Graph.is_kept(old) and Graph.is_kept(new)
        entry.writes = len(writes)
        self._hold(tensor, entry.value)

    def _new(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        parents: tuple[TracedValue, ...],
        tensor: torch.Tensor,
    ) -> TracedValue:
        values = self.graph.values
        value = TracedValue(len(values), self._stack[-1], name, func, args, kwargs, parents, tensor)
        values.append(value)
        return value

    def enter_value(self, tensor: torch.Tensor, value: TracedValue) -> None:
        """Note which value a tensor has from now on."""
        entry = self._entries[id(tensor)] = _Entry(tensor)
        entry.value = value
        entry.writes = len(self._writes.get(_storage(tensor), ())) if self._writes else 0

    def hold(self, value: TracedValue, tensor: torch.Tensor) -> None:
        """Hold a value, whatever takes it."""
        self._hold(tensor, value)

    def _hold(self, tensor: torch.Tensor, value: TracedValue, saved: bool = False) -> None:
        """Hold a value that cannot be made again, or is ``saved`` by autograd all the same; or that of which it is a view."""
        base = value
        while base.remade and base.alias:
            base = base.parents[0]
        if not self._holds or base.held is not None or (base.remade and not base.costly and not saved):
            return
        silent, self._silent = self._silent, True  # in a hook, what is done here would be recorded too
        held = tensor if tensor.grad_fn is None else tensor.detach()
        base.held = held if base is value else held.as_strided(*base.geometry)
        self._silent = silent
        self._newly_held.append(base)

    def _replaced(self, arguments: Iterable[Any], values: list[TracedValue]) -> list[Any]:
        """Arguments with values in the place of tensors; these are added to the others."""
        found: list[Any] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                value = self.value_of(argument)
                values.append(value)
                found.append(value)
            elif isinstance(argument, (list, tuple)):
                found.append(self._replaced(argument, values))
            else:
                found.append(argument)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made from what; nothing of the recorder's own may raise in it."""
        kwargs = kwargs or {}
        if self._silent or self.graph.error is not None:
            return func(*args, **kwargs)
        try:
            taken = self._taken(func, args, kwargs)  # before it runs: it may write into what it takes
        except Exception as error:
            self.graph.error = without_frames(error)
        result = func(*args, **kwargs)
        if self.graph.error is None:
            try:
                self.note(*taken, result)
                for listener in self.listeners:
                    listener(func, args, kwargs, result)
            except Exception as error:
                self.graph.error = without_frames(error)
        return result

    def _taken(self, func: Any, args: Any, kwargs: Any) -> _Taken:
        """What an operation takes that is about to run."""
        operation = _operation(func)
        values: list[TracedValue] = []
        found = self._replaced(args, values)
        named = dict(zip(kwargs, self._replaced(kwargs.values(), values), strict=True)) if kwargs else kwargs
        target = args[0] if operation.writes else kwargs.get("out")
        if operation.carries and not operation.views:
            is_norm = operation.name in NORMS
            if is_norm or not _is_layer(operation, values):
                self._hold_operands(args, found, operation.name in SAVING and _is_saved(args))
        if target is not None and operation.name != "set":
            self._keep_numbers(target)
            named = {key: item for key, item in named.items() if key != "out"}
        if operation.name in FUSED and found[0].is_floating and not found[0].of_parameter:
            return self._fused(operation.name, args, found, kwargs, target)
        return operation, found, named, values, target

    def _fused(self, name: str, args: Any, found: Any, kwargs: Any, target: Any) -> _Taken:
        """A product that is added to a state in one operation is noted as the product and the sum."""
        with torch.no_grad():
            product = FUSED[name](*args[1:3])
        self.note(_operation(FUSED[name]), found[1:3], {}, found[1:3], None, product)
        terms, tensors = [found[0], self.value_of(product)], [args[0], product]
        for at, scale in enumerate((kwargs.get("beta", 1), kwargs.get("alpha", kwargs.get("value", 1)))):
            if scale != 1:
                self._hold(tensors[at], terms[at])
                tensors[at] = tensors[at] * scale
                by = _operation(torch.ops.aten.mul.Tensor)
                self.note(by, [terms[at], scale], {}, [terms[at]], None, tensors[at])
                terms[at] = self.value_of(tensors[at])
        self._hold_operands(tensors, terms)
        return _operation(torch.ops.aten.add.Tensor), terms, {}, terms, target

    def note(
        self,
        operation: Operation,
        found: Any,
        named: Any,
        values: list[TracedValue],
        target: Any,
        result: Any,
    ) -> None:
        """Note the values that an operation made of others."""
        if operation.name == "set":
            if len(values) > 1:  # another memory for the same tensor
                self.enter_value(target, values[1])
            return
        key = (self._stack[-1], operation.name)
        order = self._orders[key] = self._orders.get(key, -1) + 1
        func = operation.func
        if operation.name == "native_dropout":
            func, found = dropped, [found[0], self._mask(operation, order, result[1]), 1 / (1 - found[1])]
            values, result = found[:2], result[0]
        parents = (
            ()
            if operation.name in SHAPE_ONLY
            else tuple(dict.fromkeys(values) if len(values) > 1 else values)
        )
        for item, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if not isinstance(tensor, torch.Tensor):
                continue
            value = self._new(operation.name, func, found, named, parents, tensor)
            value.item, value.order, value.geometry = item, order, geometry(tensor)
            operation.describe(value)
            if operation.name in FILLS:
                value.held = _filled(value, tensor)
            if tensor is target:
                self._alive.append(tensor)
                self._writes.setdefault(_storage(target), []).append((value, geometry(target)))
            self.enter_value(tensor, value)
            if self.on_value is not None:
                self.on_value(value, tensor)

    def _mask(self, operation: Operation, order: int, tensor: torch.Tensor) -> TracedValue:
        """The elements that a dropout keeps; they depend on nothing."""
        value = self._new(operation.name, operation.func, (), {}, (), tensor)
        value.item, value.order = 1, order
        self.enter_value(tensor, value)
        self._hold(tensor, value)
        return value

    def _hold_operands(self, args: Any, found: Any, saved: bool = False) -> None:
        """Hold what an operation takes that may carry a memory."""
        for argument, value in zip(args, found, strict=True):
            if isinstance(value, TracedValue):
                self._hold(argument, value, saved)
            elif isinstance(value, list):
                self._hold_operands(argument, value)

    def _keep_numbers(self, target: torch.Tensor) -> None:
        """What is held of a memory that is about to be written keeps its numbers."""
        for value in self._newly_held:
            if value.held is not None:
                self._held.setdefault(_storage(value.held), []).append(value)
        self._newly_held.clear()
        for value in self._held.pop(_storage(target), ()):
            if value.held is not None:
                value.held = value.held.clone()


class Operation(NamedTuple):
    """What is known of an operation by its name."""

    func: Any
    name: str  # without the sign of what writes in place
    writes: bool  # into its first operand
    views: bool  # what it gives lies in the memory of what it takes
    carries: bool

    def describe(self, value: TracedValue) -> None:
        """Note whether what it made is a view, a parameter in another form, and can be made again."""
        value.alias = self.views
        if self.name in FUNCTIONS:  # what a layer or a norm over the batch made is not made again
            value.remade = self.name not in BATCH_NORMS and all(Graph.is_kept(p) for p in value.parents)
        elif self.carries:
            by_parameter = any(parent.of_parameter for parent in value.parents)
            value.remade, value.costly = True, by_parameter and self.name in MATRICES
            passes = self.name in SAME or self.name in MOVES
            value.of_parameter = by_parameter and passes and len(value.parents) == 1


LINEAR = Operation(torch.ops.aten.linear.default, "linear", writes=False, views=False, carries=False)


def _is_closed(layer: nn.Linear) -> bool:
    """Whether a layer mixes features, and nothing but that runs in its call."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return not hooks and min(layer.weight.shape) > MOST_STREAMS and isinstance(layer.weight, nn.Parameter)


def _is_alone() -> bool:
    """Whether no mode of the user's is on, which would not see a layer that runs as one operation."""
    return torch._C._len_torch_dispatch_stack() == 1


@cache
def _operation(func: Any) -> Operation:
    name = func.overloadpacket.__name__
    writes = name.endswith("_") and func._schema.is_mutable
    name = name[:-1] if writes else name
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return Operation(
        func, name, writes, alias is not None and not alias.is_write, name in CARRYING or name in NORMS
    )


def _is_saved(args: Any) -> bool:
    """Whether autograd saves what an operation of `SAVING` takes: it needs it for the gradients of the others."""
    tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
    return len(tensors) > 1 and all(tensor.requires_grad for tensor in tensors)


def _is_layer(operation: Operation, values: Sequence[TracedValue]) -> bool:
    """Whether a matrix is a parameter that is larger than what mixes streams."""
    if operation.name not in MATRICES:
        return False
    matrices = (value for value in values if value.of_parameter and len(value.shape) > 1)
    return any(min(value.shape[-2:]) > MOST_STREAMS for value in matrices)


def _filled(value: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
    """A constant, without memory of its size."""
    fill = FILLS[value.name]
    if fill is None:
        fill = value.args[2 if value.name == "new_full" else 1]
    return torch.full((), fill, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of a call, and among the parts of what a model returns."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        for item in batch.values():
            yield from tensors_of(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors_of(item)
    elif hasattr(batch, "__dict__") and not isinstance(batch, nn.Module):
        yield from tensors_of(vars(batch))


@contextmanager
def recording(recorder: GraphRecorder) -> Iterator[None]:
    """Record the forward of a model that runs inside; hooks of torch on all modules note the calls."""

    def enter(module: nn.Module, args: Any) -> None:
        path = recorder.paths.get(id(module))
        if path is not None:
            recorder.enter(path, type(module).__name__, floats_in(args), module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path = recorder.paths.get(id(module))
        if path is not None:
            recorder.leave(path, output, floats_in(output))

    before = hooked.register_module_forward_pre_hook(enter)
    after = hooked.register_module_forward_hook(leave, always_call=True)
    try:
        with recorder:
            yield
    finally:
        before.remove()
        after.remove()


def recorded(model: nn.Module, batch: Any) -> tuple[Graph, Any]:
    """The values of one forward; a dict is passed as keywords, a tuple as positional arguments."""
    recorder = GraphRecorder(model, list(tensors_of(batch)))
    with recording(recorder):
        args = () if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
        output = model(*args, **(batch if isinstance(batch, dict) else {}))
    return recorder.end(output), output
