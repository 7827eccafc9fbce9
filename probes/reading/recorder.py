"""How is one forward recorded? Every operation below autograd becomes a value; writes in place become new values.

Tensors are held only where carried steps may be run again, and only what cannot be made again: of what sums, products and
joins take, that which other operations made, as a layer of a branch or the function of a coefficient. What a linear layer
or a norm takes and gives inside of a branch is let go with the forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooked
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.modules import module_paths
from depthscope.probes.model.tensors import Listener, floats_in, split_over
from depthscope.probes.model.user_modes import circumstances
from depthscope.probes.reading.graph import (
    CONSTANT,
    FILLS,
    INPUT,
    LEAF,
    OUTPUT,
    PARAMETER,
    SHAPE_ONLY,
    UNSEEN,
    Graph,
    ModuleCall,
    ReadingError,
    Shown,
    TracedValue,
    container_of,
    dropped,
    tensors_of,
    walk,
)
from depthscope.probes.reading.operations import (
    ADD,
    EMPTY,
    FUSED,
    MOST_STREAMS,
    MUL,
    NORMS,
    SAVING,
    KnownOperation,
    decomposed,
    is_layer,
    is_saved,
    is_unwritten,
    only_operation,
    operation_of,
)
from depthscope.probes.reading.tensor_memory import (
    TensorEntry,
    can_end,
    detached,
    ended,
    filled_with,
    geometry,
    is_imagined,
    is_plain,
    own_part,
    patched,
    storage_of,
    unseen_by_modes,
)

# An operation, what it takes with values for tensors, these values, and what it writes into.
_Taken = tuple[KnownOperation, Any, Any, list[TracedValue], list[torch.Tensor]]

NESTED = "the model computes with nested tensors, whose tokens lie along no axis; pad them, and pass a mask"


class GraphRecorder(TorchDispatchMode):
    """The values of a forward, as long as it is on.

    ``holds``: whether tensors are held, so that what is carried can be run again.
    ``hooks``: how many hooks before, and after, each call note it, by `enter` and `leave`.
    """

    def __init__(
        self, model: nn.Module, batch: Sequence[torch.Tensor], *, holds: bool = True, hooks: int = 0
    ):
        super().__init__()
        self._holds, self._hooks = holds, hooks
        self.graph = Graph()
        self._given = {id(tensor): position for position, tensor in enumerate(batch)}
        self.graph.circumstances = circumstances(model, batch)
        self.paths: dict[int, str] = {}  # of modules
        self._names: dict[int, str] = {}  # of parameters
        for path, module in module_paths(model):
            self.paths[id(module)] = path
            self.graph.modules[path] = type(module).__name__
            for name, parameter in module._parameters.items():
                self._names[id(parameter)] = f"{path}.{name}" if path else name
                if parameter is not None:
                    self._names[id(own_part(parameter))] = self._names[id(parameter)]
        self._numbered = {path for path in self.graph.modules if container_of(path) is not None}
        self._stack = [-1]
        self._running: list[nn.Module | None] = []
        self._num_shown = 0
        self._depth_in_blocks = 0  # how many modules with a number are running
        self._begins = {-1: (0, list[int]())}  # by call: its first value, and what it takes
        self._calls: dict[str, int] = {}
        self._orders: dict[tuple[int, str], int] = {}
        self._entries: dict[int, TensorEntry] = {}  # by the identities of tensors
        self._tensors: dict[int, list[TensorEntry]] = {}  # by the numbers of their values
        self._large: list[TracedValue] = []  # what is held and may be let go before the forward ends
        self._newly_held: list[TracedValue] = []
        self._held: dict[int, list[TracedValue]] = {}  # by the memory that they share
        self._writes: dict[int, list[tuple[TracedValue, tuple[Any, ...]]]] = {}
        self._alive: list[torch.Tensor] = []  # what was written, so that its memory is not given to another
        self._layer: _Taken | None = None  # the layer that is running, if it is one operation
        self._silent = False
        # Called with every value that an operation takes or a module shows, and its tensor, which has a graph by then.
        self.on_taken: Callable[[TracedValue, torch.Tensor], None] | None = None
        # Called with every value and its tensor when it is made.
        self.on_value: Callable[[TracedValue, torch.Tensor], object] | None = None
        # Called with every operation, after what it made was noted.
        self.listeners: list[Listener] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every call of the method below; nothing of it is compiled anyway

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called with some arguments. Some layers are one operation."""
        tensors, arguments, kind = list[torch.Tensor](), list[int | str](), type(module).__name__
        for of, value in (*enumerate(args), *kwargs.items()):
            floats = floats_in(value)
            tensors += floats
            arguments += [of] * len(floats)
        self._find_unseen(tensors)
        index = self._calls[path] = self._calls.get(path, -1) + 1
        self.graph.calls.append(ModuleCall(path, index, self._stack[-1], kind, tuple(arguments)))
        self._stack.append(len(self.graph.calls) - 1)
        self._running.append(module)
        only = only_operation(module, tensors, self._hooks)
        if only is not None:
            operation, operands = only
            values: list[TracedValue] = []
            self._layer = operation, self._replaced(operands, values), {}, values, []
            if operation.carries:
                self._hold_operands(operands, self._layer[1], is_saved(operands))
            self._off = torch._C._DisableTorchDispatch()
            self._off.__enter__()
        numbers = self._show("input", tensors)
        self._hold_shown(path, tensors)
        self._depth_in_blocks += path in self._numbered
        self._begins[self._stack[-1]] = len(self.graph.values), numbers

    def leave(self, path: str, output: Any) -> None:
        """Note that the innermost call has ended, and what it hands on."""
        if self._layer is not None:
            self._off.__exit__(None, None, None)
            taken, self._layer = self._layer, None
            if isinstance(output, torch.Tensor):
                self.note(*taken, output)
                self.known(output).made_at = OUTPUT
        tensors = floats_in(output)
        self._find_unseen(tensors)
        self._show("output", tensors)
        self._depth_in_blocks -= path in self._numbered
        self._hold_shown(path, tensors)
        if path in self._numbered:
            self.graph.handed_on |= {self.value_of(tensor).number for tensor in tensors_of(output)}
        call = self._stack.pop()
        self.graph.made_in[call] = range(self._begins[call][0], len(self.graph.values))
        self._running.pop()
        if self._large:
            self._let_go(self.graph.made_in[call])

    def _let_go(self, made: range) -> None:
        """Hold no longer what no memory can need of what was made in a call that has ended."""
        held = [value for value in self._large if value.number in made]
        if not held:
            return
        gone = ended(held, self.graph.values[made.start :], lambda of: self.living(of) is not None)
        for value in gone:
            value.held = None
        self._large = [value for value in self._large if value.held is not None]

    def _hold_shown(self, path: str, tensors: Sequence[torch.Tensor]) -> None:
        """Hold what an outermost module with a number takes or gives: its states, where no sum shows them."""
        if path in self._numbered and not self._depth_in_blocks and tensors:
            self.hold(self.known(tensors[0]), tensors[0])

    def _show(self, at: str, tensors: Sequence[torch.Tensor]) -> list[int]:
        numbers = [self.value_of(tensor).number for tensor in tensors]
        for item, number in enumerate(numbers):
            if not is_plain(tensors[item]) and (split := split_over(tensors[item])):
                self.graph.split[number] = split
            self._num_shown += 1
            shown = Shown(self._stack[-1], at, item, self._num_shown)
            self.graph.shown.setdefault(number, []).append(shown)
        return numbers

    def end(self, output: Any) -> Graph:
        """The graph of the forward that returned this output."""
        self.graph.outputs = [self.value_of(tensor) for tensor in tensors_of(output)]
        return self.graph

    def value_of(self, tensor: torch.Tensor) -> TracedValue:
        """The value that a tensor has now, as it is taken."""
        value = self.known(tensor)
        if tensor.requires_grad:
            value.has_graph = True
        if self.on_taken is not None:
            self.on_taken(value, tensor)
        return value

    def known(self, tensor: torch.Tensor) -> TracedValue:
        """The value that a tensor has now."""
        entry = self._entries.get(id(tensor))
        if entry is not None and not self._writes and entry() is tensor and entry.value.kind != CONSTANT:
            return entry.value  # as nearly always
        tensor = own_part(tensor)
        entry = self._entry(tensor)
        value = self._current(tensor, entry) if entry is None or self._writes else entry.value
        if value.kind == CONSTANT and tensor.grad_fn is not None:  # computed by what is no operation
            return self._unseen(tensor)
        return value

    def living(self, value: TracedValue) -> torch.Tensor | None:
        """The tensor of a value, if anything holds it still."""
        entries = (entry for entry in self._tensors.get(value.number, ()) if entry.value is value)
        return next((tensor for entry in entries if (tensor := entry()) is not None), None)

    def _entry(self, tensor: torch.Tensor) -> TensorEntry | None:
        """What is noted of a tensor; None of one that was not met, also where one that is gone had its identity."""
        entry = self._entries.get(id(tensor))
        return entry if entry is not None and entry() is tensor else None

    def _order(self, name: str) -> int:
        """How many operations of a name ran before in the call that is running."""
        order = self._orders[self._stack[-1], name] = self._orders.get((self._stack[-1], name), -1) + 1
        return order

    def _current(self, tensor: torch.Tensor, entry: TensorEntry | None) -> TracedValue:
        """The value of a tensor that was not met before, or whose memory may have been written."""
        writes = self._writes.get(storage_of(tensor), ()) if self._writes else ()
        if entry is None:
            value = self._leaf(tensor)
            if not writes or self._is_lent(tensor):
                return value
            entry = self._entries[id(tensor)]
            entry.writes = 0
        if entry.writes < len(writes):
            self._rewritten(entry, tensor, writes)
        return entry.value

    def _leaf(self, tensor: torch.Tensor) -> TracedValue:
        if tensor.is_nested:
            raise ReadingError(NESTED)
        value = self._new(LEAF, None, (), {}, (), tensor)
        name = self._names.get(id(tensor)) or (self._lent_name(tensor) if self._is_lent(tensor) else None)
        if name is not None or isinstance(tensor, nn.Parameter):
            value.kind, value.of_parameter = PARAMETER, True
            self.graph.parameter_names[value.number] = name or ""
        else:
            value.given_at = self._given.get(id(tensor))
            value.kind = CONSTANT if value.given_at is None else INPUT
        self.enter_value(tensor, value)
        self._hold(tensor, value)
        return value

    def _is_lent(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter is none of the model's own: it is there for a call, of weights that are kept elsewhere."""
        return isinstance(tensor, nn.Parameter) and id(tensor) not in self._names

    def _lent_name(self, tensor: torch.Tensor) -> str | None:
        """The name of a parameter that is lent to a running module."""
        for call, module in zip(self._stack[:0:-1], self._running[::-1], strict=True):
            for name, own in module._parameters.items() if module is not None else ():
                if own is tensor:
                    return f"{self.graph.calls[call].path}.{name}".lstrip(".")
        return None

    def _rewritten(
        self, entry: TensorEntry, tensor: torch.Tensor, writes: Sequence[tuple[TracedValue, tuple]]
    ) -> None:
        own = geometry(tensor)
        for new, where in writes[entry.writes :]:
            if new is entry.value:
                continue
            if where == own:
                self._point(entry, new)
                continue
            old = entry.value
            self._point(entry, self._new("patch", patched, (old, new, own, where), {}, (old, new), tensor))
            entry.value.geometry, entry.value.order = own, self._order("patch")
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
        entry = self._entries[id(tensor)] = TensorEntry(tensor)
        self._point(entry, value)
        entry.writes = len(self._writes.get(storage_of(tensor), ())) if self._writes else 0

    def _point(self, entry: TensorEntry, value: TracedValue) -> None:
        entry.value = value
        self._tensors.setdefault(value.number, []).append(entry)

    def hold(self, value: TracedValue, tensor: torch.Tensor) -> None:
        """Hold a value to the end, whatever takes it, or what it can be made again from."""
        self._hold(tensor, value)
        if self._large:
            needed = set(walk([value], lambda of: of.parents if of.remade and of.held is None else ()))
            self._large = [of for of in self._large if of not in needed]

    def _hold(self, tensor: torch.Tensor, value: TracedValue, saved: bool = False) -> None:
        """Hold a value that cannot be made again, or is ``saved`` by autograd all the same; or that of which it is a view."""
        base = value
        while base.remade and base.alias:
            base = base.parents[0]
        if not self._holds or base.held is not None or (base.remade and not base.costly and not saved):
            return
        tensor = own_part(tensor)
        if not is_plain(tensor):
            base = value  # no view of its memory can be taken
        is_lent = self._is_lent(tensor)
        if is_lent and tensor.ndim > 1 and min(tensor.shape[-2:]) > MOST_STREAMS:
            return  # the weight of a layer, whose memory is freed after the call
        may_end = can_end(base, tensor)
        if base is value and tensor.grad_fn is None and not is_lent and not may_end:
            base.held = tensor
        else:
            silent, self._silent = self._silent, True  # in a hook, what is done here would be recorded too
            with unseen_by_modes(tensor):
                # Another tensor in the same memory: of its own one it is seen when the model lets it go.
                held = tensor if tensor.grad_fn is None and not may_end else tensor.detach()
                held = held.detach().clone() if is_lent else held
                base.held = held if base is value else held.as_strided(*base.geometry)
            self._silent = silent
        if may_end:
            self._large.append(base)
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
        if any(hasattr(of, "_op_dispatcher") for of in types):
            return NotImplemented  # a DTensor's own operations follow, on the part that this process has
        if any(map(self._is_unreadable, types)):
            return func(*args, **kwargs)
        if operation_of(func).is_composite:
            return decomposed(self, func, args, kwargs)
        try:
            taken = self._taken(func, args, kwargs)  # before it runs: it may write into what it takes
        except Exception as error:
            self.graph.error = without_frames(error)
        result = func(*args, **kwargs)
        if self.graph.error is None and not is_imagined(type(result)):
            try:
                self._note_result(taken, func, args, kwargs, result)
            except Exception as error:
                self.graph.error = without_frames(error)
        return result

    def _is_unreadable(self, of: type) -> bool:
        """Whether the tensors of a class are not looked at; nested ones end the recording."""
        if of.__name__ == "NestedTensor":
            self.graph.error = ReadingError(NESTED)
        return self.graph.error is not None or is_imagined(of)

    def _note_result(self, taken: _Taken, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what an operation gave, and tell those who listen."""
        operations = self.graph.operations.setdefault(self._stack[-1], [])
        operations.append(func)
        first = len(self.graph.values)
        if taken[0].mutates:
            self.note(*taken, (result, *taken[-1]))
        else:
            self.note(*taken, result)
            self._place(result, first, len(operations) - 1)
        for listener in self.listeners:
            listener(func, args, kwargs, result)

    def _place(self, result: Any, first: int, place: int) -> None:
        """Note by which operation of its call each new value was made that an operation gave."""
        for item, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            entry = self._entries.get(id(tensor))
            if entry is not None and entry.value.number >= first and entry.value.item == item:
                entry.value.made_at = place

    def _taken(self, func: Any, args: Any, kwargs: Any) -> _Taken:
        """What an operation takes that is about to run."""
        operation = operation_of(func)
        found, named, values = self._values_of(args, kwargs)
        targets = operation.targets(args, kwargs)
        if not operation.views and any(map(is_unwritten, values[operation.writes :])):
            self._find_unseen(tensors_of(args[operation.writes :]))
            found, named, values = self._values_of(args, kwargs)
        is_random = operation.writes and not values[0].parents and not Graph.is_kept(values[0])
        shares_memory = operation.views and is_plain(args[0])  # with what is held as soon as it is taken
        if operation.carries and not shares_memory and not is_random:
            is_norm = operation.name in NORMS
            if is_norm or not is_layer(operation, values):
                self._hold_operands(args, found, operation.name in SAVING and is_saved(args))
        for target in targets if operation.name != "set" else ():
            self._keep_numbers(target)
            # Run again, it gives a value of its own: the overload that writes is not the one that does.
            if "out" in named:
                operation = operation._replace(func=func.overloadpacket)
                named = {key: item for key, item in named.items() if key != "out"}
        if operation.name in FUSED and found[0].is_floating and not found[0].of_parameter:
            return self._fused(operation.name, args, found, kwargs, targets)
        return operation, found, named, values, targets

    def _values_of(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[TracedValue]]:
        """Arguments with values in the place of tensors, and these values."""
        values: list[TracedValue] = []
        found = self._replaced(args, values)
        named = dict(zip(kwargs, self._replaced(kwargs.values(), values), strict=True)) if kwargs else kwargs
        return found, named, values

    def _find_unseen(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note the tensors that were computed since the last operation, by what is no operation."""
        for tensor in tensors:
            entry = self._entry(tensor)
            if entry is not None and not entry.value.alias and entry.value.name not in EMPTY:
                continue
            tensor = own_part(tensor)
            entry = self._entry(tensor)
            if entry is None:
                is_unseen = tensor.grad_fn is not None and id(tensor) not in self._given
            else:
                is_unseen = is_unwritten(entry.value)
            if is_unseen and len(self._stack) > 1:
                self._unseen(tensor)

    def _unseen(self, tensor: torch.Tensor) -> TracedValue:
        """The value of a tensor that no operation made: it may come from all that the call around it took and made so far."""
        call, values = self._stack[-1], self.graph.values
        start, inputs = self._begins[call]
        made = values[start:]
        taken = {parent.number for value in made for parent in value.parents}
        parents = [values[number] for number in inputs]
        parents += [value for value in made if value.number not in taken and not value.kind]
        parents = parents or [value for value in values if value.kind == INPUT]
        value = self._new(UNSEEN, None, (), {}, tuple(dict.fromkeys(parents)), tensor)
        value.order, value.geometry = self._order(UNSEEN), geometry(tensor)
        self.enter_value(tensor, value)
        return value

    def _fused(self, name: str, args: Any, found: Any, kwargs: Any, targets: list[torch.Tensor]) -> _Taken:
        """A product that is added to a state in one operation is noted as the product and the sum."""
        with torch.no_grad(), unseen_by_modes(*args[1:3]):
            product = FUSED[name](*args[1:3])
        self.note(operation_of(FUSED[name]), found[1:3], {}, found[1:3], [], product)
        scales, terms = (kwargs.get("beta", 1), kwargs.get("alpha", kwargs.get("value", 1))), []
        for tensor, scale in zip([args[0], product], scales, strict=True):
            term = self.value_of(tensor)
            self._hold(tensor, term)
            if scale != 1:
                tensor = tensor * scale
                self.note(MUL, [term, scale], {}, [term], [], tensor)
                term = self.value_of(tensor)
                self._hold(tensor, term)
            terms.append(term)
        return ADD, terms, {}, terms, targets

    def note(
        self,
        operation: KnownOperation,
        found: Any,
        named: Any,
        values: list[TracedValue],
        targets: list[torch.Tensor],
        result: Any,
    ) -> None:
        """Note the values that an operation made of others."""
        # The same value in another tensor, or another one in the same.
        if operation.name in ("set", "lift_fresh"):
            if values:
                self.enter_value(result, values[-1])
            return
        order, func = self._order(operation.name), operation.func
        if operation.name == "native_dropout":
            func, found = dropped, [found[0], self._mask(operation, order, result[1]), 1 / (1 - found[1])]
            values, result = found[:2], result[0]
        parents = () if operation.name in SHAPE_ONLY else tuple(dict.fromkeys(values))
        for item, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if not isinstance(tensor, torch.Tensor):
                continue
            value = self._new(operation.name, func, found, named, parents, tensor)
            value.item, value.order, value.geometry = item, order, geometry(tensor)
            operation.describe(value)
            if operation.name in FILLS:
                value.held = filled_with(value, tensor)
            self._made(tensor, value, any(tensor is target for target in targets))

    def _made(self, tensor: torch.Tensor, value: TracedValue, written: bool) -> None:
        """Note which value a tensor is that was made, or written."""
        if written:
            self._alive.append(tensor)
            self._writes.setdefault(storage_of(tensor), []).append((value, value.geometry))
        self.enter_value(tensor, value)
        if self.on_value is not None:
            self.on_value(value, tensor)

    def _mask(self, operation: KnownOperation, order: int, tensor: torch.Tensor) -> TracedValue:
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
                self._held.setdefault(storage_of(value.held), []).append(value)
        self._newly_held.clear()
        for value in self._held.pop(storage_of(target), ()):
            if value.held is not None:
                value.held = detached(value.held, copy=True)
                value.is_rewritten = True


@contextmanager
def recording(recorder: GraphRecorder) -> Iterator[None]:
    """Record the forward of a model that runs inside; hooks of torch on all modules note the calls."""

    def enter(module: nn.Module, args: Any) -> None:
        path = recorder.paths.get(id(module))
        if path is not None:
            recorder.enter(path, module, args, {})

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path = recorder.paths.get(id(module))
        if path is not None:
            recorder.leave(path, output)

    before = hooked.register_module_forward_pre_hook(enter)
    after = hooked.register_module_forward_hook(leave, always_call=True)
    try:
        with recorder, warnings.catch_warnings():
            # Of a model that torch.compile returned, whose own call is noted as well as that of the model inside.
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
            yield
    finally:
        before.remove()
        after.remove()
