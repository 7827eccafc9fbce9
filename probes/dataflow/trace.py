"""What was computed from what in one forward? Every value is a node; linear operations are kept so that they can be replayed.

A `TorchDispatchMode` sees every operation below autograd, whatever code makes it: a module, a method, a loop outside of all
modules, TorchScript. Of each value it notes the values that it was computed from. *Transparent* operations (views, sums,
scaling by a coefficient, products over a stream axis: `depthscope.probes.dataflow.operations`) are kept with their
coefficients: through them a state is carried linearly. All others are opaque: what they make is a source of its own.

No tensor of the model's is kept but small coefficients, and those as long as something linear was computed with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.dataflow.axes import BATCHED, Axes, all_noted, new_axes, none_noted
from depthscope.probes.dataflow.known_modules import Notes, known_modules, runs_alone
from depthscope.probes.dataflow.operations import PATCH, Rule, rule_of
from depthscope.probes.dataflow.parameters import ParameterConstants
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
    constants : ParameterConstants
        What was computed from one parameter each, and from no value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call = NONE
        self.paused = False
        self.error: Exception | None = None
        # Called with every value and its tensor when it is made: the tensor has no gradient function yet.
        self.on_value: Callable[[Value, torch.Tensor], None] | None = None
        self.constants = ParameterConstants()
        self.parents: list[tuple[int, ...]] = []
        self.calls: list[int] = []  # of the values, by number
        self.most_merged: Value | None = None
        self._watched: list[Value] = []  # that the model was called with
        self._entries: dict[int, _Entry] = {}
        self._forget = _forgetting(self._entries)
        self._made: dict[int, int] = {}  # how many values each call made itself
        self._writes: list[
            tuple[int, tuple[Any, ...], Value]
        ] = []  # storage, region and value of writes in place
        self._written: dict[int, StorageWeakRef] = {}  # the memory that was written, by its address
        self._between: dict[
            tuple[int, int], list[int]
        ] = {}  # `calls_between`, which is asked again and again
        self._known = known_modules()
        # The module that runs unwatched, what notes its values, the value and the tensor that it took.
        self._unwatched: tuple[nn.Module, Notes, Value, torch.Tensor] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call of the method below; nothing of it is compiled anyway.
        return False

    def __exit__(self, *error: Any) -> None:
        self.watch_again()  # a module may have raised
        super().__exit__(*error)

    # --- while the forward runs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made from what."""
        kwargs = kwargs or {}
        if self.paused or self.error is not None:
            return func(*args, **kwargs)
        operands: list[Value] = []
        found, named = args, kwargs
        try:
            # Before it runs: it may write into what it takes.
            found = tuple([self._replaced(argument, operands) for argument in args])
            if kwargs:
                named = {name: self._replaced(argument, operands) for name, argument in kwargs.items()}
        except Exception as error:  # the user's operation must run all the same
            self.error, operands = without_frames(error), []
        result = func(*args, **kwargs)
        try:
            if operands:
                self._note(func, args, kwargs, (found, named, operands), result)
            else:
                self.constants.note(func, args, kwargs, result)
        except Exception as error:
            self.error = without_frames(error)
        return result

    def _replaced(self, argument: Any, operands: list[Value]) -> Any:
        if isinstance(argument, torch.Tensor):
            value = self.value(argument)
            if value is None:
                return argument
            operands.append(value)
            return value
        if isinstance(argument, (list, tuple)):
            for item in argument:
                if isinstance(item, torch.Tensor):
                    return [self._replaced(each, operands) for each in argument]
        return argument

    def value(self, tensor: torch.Tensor | None) -> Value | None:
        """The value that a tensor holds; None where no operation of the forward made it."""
        entry = self._entries.get(id(tensor))
        if not self._written:  # as in most models
            return None if entry is None else entry.value
        if entry is None:
            entry = self._written_constant(tensor)
        if entry is None:
            return None
        if entry.writes < len(self._writes):
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
        value = self.value(tensor)
        if value is None and tensor is not None and tensor.is_floating_point():
            self.watch(tensor)
            value = self.value(tensor)
        return value

    def watch(self, tensor: torch.Tensor, batch_axis: int | None = None) -> None:
        """Follow a tensor that came from outside of the forward, as the model's input, and its axis of sequences."""
        if self.value(tensor) is not None:
            return
        value = self._new_value(tensor, new_axes(tensor.shape), ())
        if batch_axis is not None and tensor.ndim > batch_axis:
            all_noted(value.axes[batch_axis], BATCHED)
        if self.call == NONE:
            self._watched.append(value)
        self._enter(tensor, value)

    def count_along(self, axis: int, size: int) -> None:
        """Note that the sequences of what came from outside are along another axis than was assumed."""
        for value in self._watched:
            for other in value.axes:
                none_noted(other, BATCHED)
        for value in self._watched:
            if len(value.shape) > axis and value.shape[axis] == size:
                all_noted(value.axes[axis], BATCHED)

    # --- modules of which it is known what they run

    def step_aside(self, module: nn.Module, x: torch.Tensor | None, value: Value | None) -> None:
        """Leave torch's stack of modes until the module that is about to run has ended, where it is known what it runs.

        ``module``: the module, whose hooks before its forward have all run.
        """
        known = self._known.get(type(module))
        if known is None:
            return
        if (
            value is None
            or x is None
            or type(x) is not torch.Tensor
            or not x.is_cpu
            or x.ndim < 2
            or not x.is_contiguous()
            or self.paused
            or self.error is not None
            or self._written
            or self.on_value is not None
            or not runs_alone(module)
            or not known[0](module, value)
            or torch._C._is_any_autocast_enabled()
            or torch.is_inference_mode_enabled()  # whose operations are not taken apart
            or 0 in value.shape
        ):
            return
        depth = torch._C._len_torch_dispatch_stack()
        if depth and torch._C._get_dispatch_stack_at(depth - 1) is self:
            torch._C._pop_torch_dispatch_stack(None)
            self._unwatched = module, known[1], value, x

    def watch_again(self, module: nn.Module | None = None, output: Any = None) -> None:
        """Go back on torch's stack of modes, and note what a module computed while nobody watched.

        ``module``: the module that ended; of another one than that which runs unwatched nothing is noted.
        """
        if self._unwatched is None:
            return
        unwatched, notes, value, x = self._unwatched
        self._unwatched = None
        torch._C._push_on_torch_dispatch_stack(self)
        if module is not unwatched:
            self.error = self.error or ValueError("a module raised an error that the model caught")
            return
        try:
            notes(self, module, value, x, output)
        except Exception as error:
            self.error = without_frames(error)

    def note_operation(
        self, func: Any, args: Any, found: Any, kwargs: Any, operand: Value, result: Any
    ) -> None:
        """Note what an operation of one value made that was not watched; ``found``: its arguments, with that value."""
        self._note(func, args, kwargs, (found, kwargs, [operand]), result)

    def add_value(self, tensor: torch.Tensor, axes: Axes, operand: Value) -> Value:
        """A new value that was computed from one other."""
        return self._new_value(tensor, axes, (operand,))

    def add_number(self, operand: Value) -> int:
        """The number of a value that was computed from one other, and that nobody can ask for."""
        self.parents.append((operand.number,))
        self.calls.append(self.call)
        self._made[self.call] = self._made.get(self.call, -1) + 1
        return len(self.parents) - 1

    def hold(self, tensor: torch.Tensor, value: Value) -> None:
        """Note that a tensor holds a value."""
        self._enter(tensor, value)

    def _note(
        self, func: Any, args: Any, kwargs: Any, taken: tuple[Any, Any, list[Value]], result: Any
    ) -> None:
        rule = rule_of(func)
        if rule.reads_only:
            return
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        found, named, operands = taken
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
            rule.describe(value, item, found, named, operands)
            if rule.mask and value.step is not None:  # what was drawn is a coefficient
                value.step.args = (found[0], outputs[1], found[1])
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
        if func is torch.ops.aten.rsub.Scalar:
            value.shape = operands[0].shape
        rule_of(func).describe(value, 0, args, {}, operands)
        if value.step is not None:
            self._count_merges(value, value.step, tensors or args)
        return value

    def _new_value(self, tensor: torch.Tensor, axes: Axes, operands: Any) -> Value:
        call, made = self.call, self._made
        value = Value(len(self.parents), tensor, axes, call)
        self.calls.append(call)
        value.ordinal = made[call] = made.get(call, -1) + 1
        if len(operands) == 1:
            (operand,) = operands
            self.parents.append((operand.number,))
            value.last_merge = operand.last_merge
            return value
        self.parents.append(tuple([operand.number for operand in operands]))
        for operand in operands:
            if operand.last_merge > value.last_merge:
                value.last_merge = operand.last_merge
        return value

    def _enter(self, tensor: torch.Tensor, value: Value) -> None:
        entry = _Entry(tensor, self._forget)
        entry.key, entry.value, entry.writes = id(tensor), value, len(self._writes)
        self._entries[entry.key] = entry

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
        number = value if isinstance(value, int) else value.number
        origin = on if isinstance(on, int) else on.number
        if number == origin:
            return True
        if number < origin:
            return False  # an earlier value cannot come from it
        seen: set[int] = set()
        waiting = [number]
        parents = self.parents
        while waiting:
            for parent in parents[waiting.pop()]:
                if parent == origin:
                    return True
                if parent > origin and parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
        return False

    def calls_between(self, value: Value, before: Value) -> Sequence[int]:
        """Orders of the module calls in which a value was computed, once for each operation after an earlier value."""
        known = self._between.get((value.number, before.number))
        if known is not None:
            return known
        found: list[int] = []
        seen: set[int] = set()
        waiting = [value.number]
        parents, calls, first = self.parents, self.calls, before.number
        while waiting:
            number = waiting.pop()
            found.append(calls[number])
            for parent in parents[number]:
                if parent > first and parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
        self._between[value.number, before.number] = found
        return found


def _forgetting(entries: dict[int, _Entry]) -> Callable[[_Entry], None]:
    """A function that forgets the value of a tensor that is gone; no method, since every tensor calls it."""

    def forget(entry: _Entry) -> None:
        if entries.get(entry.key) is entry:
            del entries[entry.key]

    return forget


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
