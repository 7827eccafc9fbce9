"""What was computed from what in one forward? Every value is a node; linear operations are kept so that they can be replayed.

A `TorchDispatchMode` sees every operation below autograd, whatever code makes it: a module, a method, a loop outside of all
modules, TorchScript. Of each value it notes the values that it was computed from. *Transparent* operations (views, sums,
scaling by a coefficient, products over a stream axis: `depthscope.probes.dataflow.operations`) are kept with their
coefficients: through them a state is carried linearly. All others are opaque: what they make is a source of its own.

No tensor of the model's is kept but small coefficients, and those as long as something linear was computed with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.dataflow.axes import BATCHED, Axes, all_noted, new_axes
from depthscope.probes.dataflow.operations import PATCH, Rule, rule_of
from depthscope.probes.dataflow.values import NONE, Coefficient, Step, Value, carrier_of, times_written
from depthscope.probes.model.hooks import without_frames


class _Entry(weakref.ref):
    """The value that a tensor holds."""

    __slots__ = ("key", "value", "writes")

    key: int
    value: Value
    writes: int  # how many writes in place there had been


class Trace(TorchDispatchMode):
    """The values of one forward; a dispatch mode that is on while the forward runs.

    Attributes
    ----------
    call : int
        Order of the innermost module call that is running, which the tape sets.
    paused : bool
        Whether operations are those of the probe itself.
    error : Exception or None
        Why nothing was noted from some point on: the trace then proves nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call = NONE
        self.paused = False
        self.error: Exception | None = None
        # Called with every value and its tensor when it is made: the tensor has no gradient function yet.
        self.on_value: Callable[[Value, torch.Tensor], None] | None = None
        # Called with every operation, what it took and what it gave; raises nothing.
        self.on_operation: Callable[[Any, Any, Any, Any], None] | None = None
        self.parents: list[tuple[int, ...]] = []
        self.calls: list[int] = []  # of the values, by number
        self.most_merged: Value | None = None
        self._entries: dict[int, _Entry] = {}
        self._made: dict[int, int] = {}  # how many values each call made itself
        self._writes: list[
            tuple[int, tuple[Any, ...], Value]
        ] = []  # storage, region and value of writes in place
        self._written: dict[int, StorageWeakRef] = {}  # the memory that was written, by its address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call of the method below; nothing of it is compiled anyway.
        return False

    # --- while the forward runs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made from what."""
        kwargs = kwargs or {}
        if self.paused or self.error is not None:
            return func(*args, **kwargs)
        taken: tuple[Any, Any, list[Value]] | None = None
        try:
            taken = self._taken(args, kwargs)
        except Exception as error:  # the user's operation must run all the same
            self.error = without_frames(error)
        result = func(*args, **kwargs)
        if taken is not None and taken[2]:
            try:
                self._note(func, args, kwargs, taken, result)
            except Exception as error:
                self.error = without_frames(error)
        if self.on_operation is not None:
            self.on_operation(func, args, kwargs, result)
        return result

    def _taken(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[Value]]:
        """The arguments with values in place of traced tensors, and these values."""
        operands: list[Value] = []
        found = tuple([self._replaced(argument, operands) for argument in args])
        named = (
            {name: self._replaced(argument, operands) for name, argument in kwargs.items()}
            if kwargs
            else kwargs
        )
        return found, named, operands

    def _replaced(self, argument: Any, operands: list[Value]) -> Any:
        if isinstance(argument, torch.Tensor):
            value = self.value(argument)
            if value is None:
                return argument
            operands.append(value)
            return value
        if isinstance(argument, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in argument):
            return [self._replaced(item, operands) for item in argument]
        return argument

    def value(self, tensor: torch.Tensor | None) -> Value | None:
        """The value that a tensor holds; None where no operation of the forward made it."""
        entry = self._entries.get(id(tensor))
        if entry is None:
            entry = self._written_constant(tensor)
        if entry is None:
            return None
        if self._written and entry.writes < len(self._writes):
            self._rewritten(entry, tensor)
        return entry.value

    def _written_constant(self, tensor: torch.Tensor | None) -> _Entry | None:
        """The entry of a constant, such as an empty buffer, into which something was written through a view of it."""
        if (
            not self._written
            or tensor is None
            or isinstance(tensor, nn.Parameter)
            or tensor.layout is not torch.strided
        ):
            return None
        if tensor.untyped_storage()._cdata not in self._written:
            return None
        self._enter(tensor, self._new_value(tensor, new_axes(tensor.shape), ()))
        entry = self._entries[id(tensor)]
        entry.writes = 0
        return entry

    def taken(self, tensor: torch.Tensor | None) -> Value | None:
        """The value of a tensor that a module takes; a constant, as a state that begins with zeros, is followed on."""
        if tensor is not None and self.value(tensor) is None and tensor.is_floating_point():
            self.watch(tensor)
        return self.value(tensor)

    def watch(self, tensor: torch.Tensor, batch_axis: int | None = None) -> None:
        """Follow a tensor that came from outside of the forward, as the model's input, and its axis of sequences."""
        if self.value(tensor) is not None:
            return
        value = self._new_value(tensor, new_axes(tensor.shape), ())
        if batch_axis is not None and tensor.ndim > batch_axis:
            all_noted(value.axes[batch_axis], BATCHED)
        self._enter(tensor, value)

    def _note(
        self, func: Any, args: Any, kwargs: Any, taken: tuple[Any, Any, list[Value]], result: Any
    ) -> None:
        rule = rule_of(func)
        if rule.reads_only:
            return
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        operands = taken[2]
        terms = rule.sum_of(args, kwargs) if rule.sum_of is not None else None
        # A bias that is added is a part of a linear layer, no sum of two values.
        if terms is not None and (isinstance(terms[0], tuple) or self.value(terms[0]) is not None):
            value = self._sum(terms, result)
            if value is not None:
                self._place(rule, value, result)
                return
        for item, tensor in enumerate(outputs):
            if not isinstance(tensor, torch.Tensor):
                continue
            value = self._new_value(tensor, (), operands)
            value.func = func
            rule.describe(value, item, taken[0], taken[1], operands)
            if rule.mask and value.step is not None:  # what was drawn is a coefficient
                value.step.args = (taken[0][0], outputs[1], taken[0][1])
            if value.step is not None:
                self._count_merges(value, value.step, args)
            self._place(rule, value, tensor)

    def _place(self, rule: Rule, value: Value, tensor: torch.Tensor) -> None:
        """Note that a tensor holds a value."""
        if rule.writes:
            self._note_write(tensor, value)
        self._enter(tensor, value)
        if self.on_value is not None:
            self.on_value(value, tensor)

    def _sum(self, terms: list[Any], result: torch.Tensor) -> Value | None:
        """The value of a sum of terms that one operation made; None where it is linear in none of them."""
        first, second = (self._term(term, result) for term in terms)
        return self._applied(torch.ops.aten.add.Tensor, (first, second), result)

    def _term(self, term: Any, result: torch.Tensor) -> Any:
        """One of the terms: an argument, or a function of two."""
        if isinstance(term, torch.Tensor):
            return self.value(term) or term
        if not isinstance(term, tuple):
            return term
        func, *factors = term
        tensors = [func_of_constant(factor) for factor in factors]
        return (
            self._applied(func, tuple(self._term(factor, result) for factor in factors), result, tensors)
            or result
        )

    def _applied(
        self, func: Any, args: tuple[Any, ...], result: torch.Tensor, tensors: Sequence[Any] = ()
    ) -> Value | None:
        """The value that a part of an operation made, which has no tensor of its own."""
        operands = [argument for argument in args if isinstance(argument, Value)]
        if not operands:
            return None
        value = self._new_value(result, (), operands)
        value.func = func
        if str(func).startswith("aten.rsub"):
            value.shape = operands[0].shape
        rule_of(func).describe(value, 0, args, {}, operands)
        if value.step is not None:
            self._count_merges(value, value.step, tensors or args)
        return value

    def _new_value(self, tensor: torch.Tensor, axes: Axes, operands: Any) -> Value:
        value = Value(len(self.parents), tensor, axes, self.call)
        self.parents.append(tuple([operand.number for operand in operands]))
        self.calls.append(self.call)
        value.ordinal = self._made[self.call] = self._made.get(self.call, -1) + 1
        for operand in operands:
            if operand.last_merge > value.last_merge:
                value.last_merge = operand.last_merge
        return value

    def _enter(self, tensor: torch.Tensor, value: Value) -> None:
        entry = _Entry(tensor, self._forget)
        entry.key, entry.value, entry.writes = id(tensor), value, len(self._writes)
        self._entries[entry.key] = entry

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    def _count_merges(self, value: Value, step: Step, args: Any) -> None:
        rule, operands = step.rule, step.operands
        if rule.product:
            _keep_coefficients(step, args)
        carrier = carrier_of(step)
        value.merges, value.root = carrier.merges, carrier.root
        if rule.sums and len(operands) > 1:
            # Something computed from the state comes back to it: its last merge is not before the state's own.
            if not carrier.merges or all(o is carrier or o.last_merge >= carrier.root for o in operands):
                value.merges += 1
                value.root = value.last_merge = value.number
            if self.most_merged is None or value.merges >= self.most_merged.merges:
                self.most_merged = value

    # --- writes in place

    def _note_write(self, tensor: torch.Tensor, value: Value) -> None:
        memory = tensor.untyped_storage()
        storage = memory._cdata
        # As long as a weak reference to it is there, the address is given to no other memory.
        self._written.setdefault(storage, StorageWeakRef(memory))
        self._writes.append((storage, _region(tensor), value))

    def _rewritten(self, entry: _Entry, tensor: torch.Tensor | None) -> None:
        """Bring an entry up to date with the writes into its memory through other tensors."""
        assert tensor is not None
        storage, region = tensor.untyped_storage()._cdata, _region(tensor)
        for written, where, value in self._writes[entry.writes :] if storage in self._written else ():
            if written == storage and value is not entry.value:
                entry.value = value if where == region else self._patched(tensor, entry.value, value, where)
        entry.writes = len(self._writes)

    def _patched(self, tensor: torch.Tensor, old: Value, new: Value, where: tuple[Any, ...]) -> Value:
        """The value of a tensor into a part of whose memory another value was written."""
        value = self._new_value(tensor, old.axes, (old, new))
        shape, stride, offset = where
        own = _region(tensor)
        value.step = Step(PATCH, None, (old, new, shape, stride, offset - own[2], own[1]), {}, (old, new))
        carrier = carrier_of(value.step)
        value.merges, value.root = carrier.merges, carrier.root
        return value

    # --- afterwards

    def depends(self, value: Value | int, on: Value | int) -> bool:
        """Whether a value was computed from another one, by whatever operations; both may be given by their numbers."""
        number, origin = (of if isinstance(of, int) else of.number for of in (value, on))
        if number == origin:
            return True
        seen: set[int] = set()
        waiting = [number]
        while waiting:
            for parent in self.parents[waiting.pop()]:
                if parent == origin:
                    return True
                if parent > origin and parent not in seen:  # an earlier value cannot come from it
                    seen.add(parent)
                    waiting.append(parent)
        return False

    def calls_between(self, value: Value, before: Value) -> Iterator[int]:
        """Orders of the module calls in which a value was computed, once for each operation after an earlier value."""
        seen: set[int] = set()
        waiting = [value.number]
        while waiting:
            number = waiting.pop()
            yield self.calls[number]
            for parent in self.parents[number]:
                if parent > before.number and parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)


def func_of_constant(factor: Any) -> Any:
    """A factor as a tensor: itself, or what a function of a tensor and a number gives."""
    if isinstance(factor, tuple):
        func, *args = factor
        return func(*args)
    return factor


def _region(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _keep_coefficients(step: Step, args: Any) -> None:
    """Keep the smaller one of the factors of a product, or both where they are of one size.

    What scales or mixes a state is mostly far smaller than the state. Keeping larger ones would keep activations.
    """
    factors = step.rule.factors(args)
    sizes = [factor.numel() if isinstance(factor, torch.Tensor) else 0 for factor in factors]
    smallest = min(sizes)
    for position, factor in enumerate(factors):
        if isinstance(factor, torch.Tensor) and sizes[position] == smallest:
            step.coefficients[position] = Coefficient(factor, times_written(factor))
