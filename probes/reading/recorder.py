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
    names,
)

# Operations whose operands are held; of products of matrices without a weight among them.
HELD = names(
    "add sub rsub mul div where lerp masked_fill addcmul addcdiv index_add index_copy scatter_add scatter index_put "
    "slice_scatter select_scatter patch copy masked_scatter cat stack native_dropout sum mean embedding "
    "native_batch_norm _native_batch_norm_legit cudnn_batch_norm _batch_norm_with_update"
)
COPIES = names("clone contiguous _to_copy lift_fresh_copy")
MATRICES = names("mm bmm matmul addmm baddbmm mv dot")
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
            args = (entry.value, new, own, where)
            entry.value = self._new("patch", "patch", args, {}, tensor)
            self._hold(tensor, entry.value)
        entry.writes = len(writes)

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
        """Hold a value, and those of which it is a view or a copy."""
        held: torch.Tensor | None = tensor.detach()
        own = True  # whether what is held lies in the memory of the value itself
        while held is not None and value.held is None:
            value.held = held
            storage = _storage(held)
            self._held.setdefault(storage, []).append(value)
            parent = value.parents[0] if value.parents else None
            if parent is None or storage in self._writes:
                return
            if value.alias:
                held = held.as_strided(*parent.geometry) if own else _unviewed(value, parent, held)
            elif value.name in COPIES and torch.promote_types(parent.dtype, value.dtype) == value.dtype:
                held, own = held.to(parent.dtype), False
            else:
                return
            value = parent

    def _replaced(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self.value_of(argument)
        if isinstance(argument, (list, tuple)):
            return [self._replaced(item) for item in argument]
        return argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made from what."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "set_" and len(args) == 2 and isinstance(args[1], torch.Tensor):
            value = self.value_of(args[1])  # another memory for the same tensor
            result = func(*args, **kwargs)
            self._enter(args[0], value)
            return result
        found = [self._replaced(argument) for argument in args]
        named = {key: self._replaced(item) for key, item in kwargs.items()} if kwargs else {}
        writes = name.endswith("_") and func._schema.is_mutable and isinstance(args[0], torch.Tensor)
        target = args[0] if writes else kwargs.get("out")
        plain = name[:-1] if writes else name
        self._hold_operands(plain, args, found)
        if isinstance(target, torch.Tensor):
            self._keep_numbers(target)
            named.pop("out", None)
        if plain in FUSED and found[0].is_floating and found[0].kind != PARAMETER:
            return self._fused(plain, func, args, found, kwargs, target)
        result = func(*args, **kwargs)
        self._note(plain, func, found, named, result, target)
        return result

    def _fused(self, name: str, func: Any, args: Any, found: Any, kwargs: Any, target: Any) -> Any:
        """A product that is added to a state in one operation is noted as the product and the sum."""
        product_of = FUSED[name]
        with torch.no_grad():
            product = product_of(*args[1:3])
        result = func(*args, **kwargs)
        self._note(product_of.overloadpacket.__name__, product_of, found[1:3], {}, product, None)
        terms = [found[0], self.value_of(product)]
        for at, scale in enumerate((kwargs.get("beta", 1), kwargs.get("alpha", kwargs.get("value", 1)))):
            if scale != 1:
                scaled = (args[0] if at == 0 else product) * scale
                self._note("mul", torch.ops.aten.mul.Tensor, [terms[at], scale], {}, scaled, None)
                terms[at] = self.value_of(scaled)
        self._note("add", torch.ops.aten.add.Tensor, terms, {}, result, target)
        return result

    def _note(self, name: str, func: Any, found: Any, named: Any, result: Any, target: Any) -> None:
        key = (self._stack[-1], name)
        order = self._orders[key] = self._orders.get(key, -1) + 1
        for item, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if not isinstance(tensor, torch.Tensor):
                continue
            value = self._new(name, func, found, named, tensor)
            value.item, value.order, value.alias = item, order, _is_view(func)
            if target is not None and tensor is target:
                self._alive.append(tensor)
                self._writes.setdefault(_storage(target), []).append((value, geometry(target)))
            self._enter(tensor, value)
            if name in HELD or not value.is_floating or (name in MATRICES and not _has_weight(found)):
                self._hold(tensor, value)

    def _hold_operands(self, name: str, args: Any, found: Any) -> None:
        """Hold what an operation takes, where it may carry a memory; and whatever is no real number."""
        holds = name in HELD or (name in MATRICES and not _has_weight(found))
        for argument, value in zip(args, found, strict=True):
            if isinstance(value, TracedValue):
                if value.held is None and (holds or not value.is_floating):
                    self._hold(argument, value)
            elif isinstance(value, list):
                for tensor, each in zip(argument, value, strict=True):
                    if (
                        isinstance(each, TracedValue)
                        and each.held is None
                        and (holds or not each.is_floating)
                    ):
                        self._hold(tensor, each)

    def _keep_numbers(self, target: torch.Tensor) -> None:
        """What is held of a memory that is about to be written keeps its numbers."""
        for value in self._held.pop(_storage(target), ()):
            if value.held is not None:
                value.held = value.held.clone()


def _unviewed(value: TracedValue, parent: TracedValue, held: torch.Tensor) -> torch.Tensor | None:
    """What a view was taken of, from a copy of the view; None where that is not all of it."""
    if value.numel != parent.numel:
        return None
    if value.name == "permute":
        return held.permute([[d % held.ndim for d in value.args[1]].index(dim) for dim in range(held.ndim)])
    if value.name in ("transpose", "t"):
        return held.transpose(*(value.args[1:3] or (0, -1)))
    return held.reshape(parent.shape)


@cache
def _is_view(func: Any) -> bool:
    """Whether what an operation gives lies in the memory of what it takes."""
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return alias is not None and not alias.is_write


def _has_weight(found: Sequence[Any]) -> bool:
    """Whether a matrix is a weight that is larger than what mixes streams: a layer of a branch."""
    for value in found:
        origin = value
        while isinstance(origin, TracedValue) and len(origin.parents) == 1 and not origin.kind:
            origin = origin.parents[0]
        is_weight = isinstance(origin, TracedValue) and origin.kind == PARAMETER and len(value.shape) > 1
        if is_weight and min(value.shape[-2:]) > MOST_STREAMS:
            return True
    return False


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
