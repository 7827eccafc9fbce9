"""How is one forward recorded? Every operation below autograd becomes a value; writes in place become new values.

Tensors are held only where carried steps may be run again: what sums, products and joins take. What a linear layer or a
norm takes and gives is let go with the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooked
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.reading.graph import (
    CONSTANT,
    INPUT,
    LEAF,
    PARAMETER,
    Graph,
    ModuleCall,
    TracedValue,
    geometry,
    patched,
)
from depthscope.probes.reading.operations import (
    JOINS,
    MATRICES,
    MOVES,
    PRODUCTS,
    REDUCES,
    SAME,
    SCATTERS,
    SUMS,
)  # fmt: skip

# What carries a memory: its operands are held, and what it gives is made again from them.
CARRYING = SAME | MOVES | REDUCES | JOINS | {*SUMS, *SCATTERS, *PRODUCTS, *MATRICES}
# Sums with a product in one operation, and the product alone.
FUSED = {
    "addmm": torch.ops.aten.mm.default,
    "baddbmm": torch.ops.aten.bmm.default,
    "addcmul": torch.ops.aten.mul.Tensor,
}
MOST_STREAMS = 64


class _Entry(weakref.ref):
    """The value that a tensor has, and how many writes into its memory it knows of."""

    __slots__ = ("key", "value", "writes")

    key: int
    value: TracedValue
    writes: int


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own, as a wrapper's
        return id(tensor)


class GraphRecorder(TorchDispatchMode):
    """The values of a forward, as long as it is on."""

    def __init__(self, model: nn.Module, batch: Sequence[torch.Tensor]):
        super().__init__()
        self.graph = Graph(modules={path: type(module).__name__ for path, module in model.named_modules()})
        self._given = {id(tensor) for tensor in batch}
        self._names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self._stack = [-1]
        self._calls: dict[str, int] = {}
        self._orders: dict[tuple[int, str], int] = {}
        self._entries: dict[int, _Entry] = {}
        self._held: dict[int, list[TracedValue]] = {}  # by the memory that they share
        self._writes: dict[int, list[tuple[TracedValue, tuple[Any, ...]]]] = {}
        self._alive: list[
            torch.Tensor
        ] = []  # memory that was written, so that its address is not given twice
        self._forget = _forgetting(self._entries)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every call of the method below; nothing of it is compiled anyway

    def enter(self, path: str, kind: str) -> None:
        """Note that a module is called."""
        index = self._calls[path] = self._calls.get(path, -1) + 1
        self.graph.calls.append(ModuleCall(path, index, self._stack[-1], kind))
        self._stack.append(len(self.graph.calls) - 1)

    def leave(self, path: str, output: Any) -> None:
        """Note that the innermost call has ended, and what a numbered module hands on."""
        self._stack.pop()
        if path.rpartition(".")[2].isdigit():
            self.graph.handed_on |= {self.value_of(tensor).number for tensor in tensors_of(output)}

    def value_of(self, tensor: torch.Tensor) -> TracedValue:
        """The value that a tensor has now."""
        entry = self._entries.get(id(tensor))
        writes = self._writes and self._writes.get(_storage(tensor))
        if entry is None:
            value = self._leaf(tensor)
            if not writes:
                return value
            entry = self._entries[id(tensor)]
            entry.writes = 0
        if writes and entry.writes < len(writes):
            self._rewritten(entry, tensor, writes)
        return entry.value

    def _leaf(self, tensor: torch.Tensor) -> TracedValue:
        value = self._new(LEAF, None, (), {}, tensor)
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._names:
            value.kind = PARAMETER
            self.graph.parameter_names[value.number] = self._names.get(id(tensor), "")
        else:
            value.kind = INPUT if id(tensor) in self._given else CONSTANT
        self._enter(tensor, value)
        self._hold(tensor, value)
        return value

    def _rewritten(
        self, entry: _Entry, tensor: torch.Tensor, writes: list[tuple[TracedValue, tuple]]
    ) -> None:
        own = geometry(tensor)
        for new, where in writes[entry.writes :]:
            if new is entry.value:
                continue
            if where == own:
                entry.value = new
                continue
            old = entry.value
            entry.value = self._new("patch", patched, (old, new, own, where), {}, tensor)
            entry.value.remade = old.is_kept and new.is_kept
        entry.writes = len(writes)
        self._hold(tensor, entry.value)

    def _new(self, name: str, func: Any, args: Any, kwargs: Any, tensor: torch.Tensor) -> TracedValue:
        value = TracedValue(len(self.graph.values), name, func, args, kwargs, tensor, self._stack[-1])
        self.graph.values.append(value)
        return value

    def _enter(self, tensor: torch.Tensor, value: TracedValue) -> None:
        entry = _Entry(tensor, self._forget)
        entry.key, entry.value = id(tensor), value
        entry.writes = len(self._writes.get(_storage(tensor), ())) if self._writes else 0
        self._entries[entry.key] = entry

    def _hold(self, tensor: torch.Tensor, value: TracedValue) -> None:
        """Hold a value that cannot be made again, or that of which it is a view."""
        base = value
        while base.remade and base.alias:
            base = base.parents[0]
        if base.is_kept:
            return
        held = tensor.detach()
        base.held = held if base is value else held.as_strided(*base.geometry)
        self._held.setdefault(_storage(held), []).append(base)

    def _replaced(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self.value_of(argument)
        if isinstance(argument, (list, tuple)):
            return [self._replaced(item) for item in argument]
        return argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made from what."""
        kwargs = kwargs or {}
        operation = _operation(func)
        if operation.name == "set_" and len(args) == 2 and isinstance(args[1], torch.Tensor):
            value = self.value_of(args[1])  # another memory for the same tensor
            result = func(*args, **kwargs)
            self._enter(args[0], value)
            return result
        found = [self._replaced(argument) for argument in args]
        named = {key: self._replaced(item) for key, item in kwargs.items()} if kwargs else kwargs
        target = args[0] if operation.writes else kwargs.get("out")
        if operation.carries and not operation.views:
            self._hold_operands(args, found)
        if target is not None:
            self._keep_numbers(target)
            named = {key: item for key, item in named.items() if key != "out"}
        if operation.name in FUSED and found[0].is_floating and not found[0].of_parameter:
            return self._fused(func, args, found, kwargs, target)
        result = func(*args, **kwargs)
        self._note(operation, found, named, result, target)
        return result

    def _fused(self, func: Any, args: Any, found: Any, kwargs: Any, target: Any) -> Any:
        """A product that is added to a state in one operation is noted as the product and the sum."""
        product_of = FUSED[_operation(func).name]
        with torch.no_grad():
            product = product_of(*args[1:3])
        result = func(*args, **kwargs)
        self._note(_operation(product_of), found[1:3], {}, product, None)
        terms = [found[0], self.value_of(product)]
        for at, scale in enumerate((kwargs.get("beta", 1), kwargs.get("alpha", kwargs.get("value", 1)))):
            if scale != 1:
                scaled = (args[0] if at == 0 else product) * scale
                self._note(_operation(torch.ops.aten.mul.Tensor), [terms[at], scale], {}, scaled, None)
                terms[at] = self.value_of(scaled)
        self._hold(product, terms[1])
        self._note(_operation(torch.ops.aten.add.Tensor), terms, {}, result, target)
        return result

    def _note(self, operation: _Operation, found: Any, named: Any, result: Any, target: Any) -> None:
        key = (self._stack[-1], operation.name)
        order = self._orders[key] = self._orders.get(key, -1) + 1
        for item, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if not isinstance(tensor, torch.Tensor):
                continue
            value = self._new(operation.name, operation.func, found, named, tensor)
            value.item, value.order, value.alias = item, order, operation.views
            if operation.name in FILLS:
                _fill(value, tensor)
            elif operation.carries:
                value.of_parameter = len(value.parents) == 1 and operation.moves and value.parents[0].of_parameter
                value.remade = operation.name not in MATRICES or not any(v.of_parameter for v in value.parents)
            if target is not None and tensor is target:
                self._alive.append(tensor)
                self._writes.setdefault(_storage(target), []).append((value, geometry(target)))
            self._enter(tensor, value)

    def _hold_operands(self, args: Any, found: Any) -> None:
        """Hold what an operation takes that may carry a memory."""
        for argument, value in zip(args, found, strict=True):
            if isinstance(value, TracedValue):
                self._hold(argument, value)
            elif isinstance(value, list):
                self._hold_operands(argument, value)

    def _keep_numbers(self, target: torch.Tensor) -> None:
        """What is held of a memory that is about to be written keeps its numbers."""
        for value in self._held.pop(_storage(target), ()):
            if value.held is not None:
                value.held = value.held.clone()


class _Operation(NamedTuple):
    """What is known of an operation by its name."""

    func: Any
    name: str  # without the sign of what writes in place
    writes: bool  # into its first operand
    views: bool  # what it gives lies in the memory of what it takes
    carries: bool
    moves: bool


@cache
def _operation(func: Any) -> _Operation:
    name = func.overloadpacket.__name__
    writes = name.endswith("_") and name != "set_" and func._schema.is_mutable
    name = name[:-1] if writes else name
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    views = alias is not None and not alias.is_write
    return _Operation(func, name, writes, views, name in CARRYING, name in SAME or name in MOVES)


def _fill(value: TracedValue, tensor: torch.Tensor) -> None:
    """A constant is made again from its shape alone."""
    number = FILLS[value.name.removeprefix("new_").removesuffix("_like")]
    fill = value.args[1 if value.name != "new_full" else 2] if number is None else number


def _forgetting(entries: dict[int, _Entry]) -> Callable[[_Entry], None]:
    """A function that forgets the value of a tensor that is gone; no method, since every tensor calls it."""

    def forget(entry: _Entry) -> None:
        if entries.get(entry.key) is entry:
            del entries[entry.key]

    return forget


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
def recording(model: nn.Module, batch: Any) -> Iterator[GraphRecorder]:
    """Record the forward that runs inside; hooks of torch on all modules note the calls."""
    recorder = GraphRecorder(model, list(tensors_of(batch)))
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}

    def enter(module: nn.Module, args: Any) -> None:
        known = paths.get(id(module))
        if known is not None:
            recorder.enter(known, type(module).__name__)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path = paths.get(id(module))
        if path is not None:
            recorder.leave(path, output)

    before = hooked.register_module_forward_pre_hook(enter)
    after = hooked.register_module_forward_hook(leave, always_call=True)
    try:
        with recorder:
            yield recorder
    finally:
        before.remove()
        after.remove()


def recorded(model: nn.Module, batch: Any) -> tuple[Graph, Any]:
    """The values of one forward; a dict is passed as keywords, a tuple as positional arguments."""
    with recording(model, batch) as recorder:
        args = () if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
        output = model(*args, **(batch if isinstance(batch, dict) else {}))
    recorder.graph.outputs = [recorder.value_of(tensor) for tensor in tensors_of(output)]
    return recorder.graph, output
