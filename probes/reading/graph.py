"""What was computed from what in one forward? Values, the operations that made them, the module calls around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError


def names(text: str) -> frozenset[str]:
    """The names of operations in a text."""
    return frozenset(text.split())


LEAF = "leaf"  # the name of a value that no operation of the forward made
UNSEEN = "unseen"  # of one that was computed in the forward, by what is no operation
PARAMETER, INPUT, CONSTANT = "parameter", "input", "constant"
# What takes only the shape of its operand.
SHAPE_ONLY = names(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided rand_like "
    "randn_like bernoulli"
)
# Constants that cost nothing to make again, and what they hold; the memory of an empty one is nothing yet.
FILLS = {"zeros": 0, "ones": 1, "empty": 0, "full": None}
FILLS |= {name: fill for of, fill in FILLS.items() for name in (f"{of}_like", f"new_{of}")}
OUTPUT = -1  # the place of what a call gives that is one operation
MOST_MADE = 8  # tensors that were made again, from which the next ones are made


class ReadingError(CaptureError):
    """No residual memory, or one that cannot be described."""


class ValuePlace(NamedTuple):
    """Where a later forward makes a value again: the k-th operation of its name in a call, and which of its results."""

    module: str
    call: int  # of the module's calls in one forward
    operation: str
    order: int
    result: int


class Shown(NamedTuple):
    """Where a call of a module showed a value."""

    call: int  # the number of the call
    at: str  # "input" or "output"
    item: int  # which of its floating tensors
    order: int  # among all that were shown


class ModuleCall(NamedTuple):
    """One call of a module."""

    path: str
    number: int  # among the calls of the module
    parent: int  # the number of the call around it; -1 for the model's own
    kind: str  # the module's class
    # In which one, by position or keyword, it takes each floating tensor
    arguments: tuple[int | str, ...] = ()

    @property
    def container(self) -> str | None:
        """What holds the module, where its name there is a number; None for others."""
        return container_of(self.path)


def container_of(path: str) -> str | None:
    """What holds a module whose name there is a number, as the blocks of a list have; None for others."""
    container, _, name = path.rpartition(".")
    return container if name.isdigit() else None


class TracedValue:
    """What one operation made: ``held`` is its tensor, or it can be made again from others where it is ``remade``."""

    item = order = 0  # which result of the operation, and of how many earlier ones of its name in the call
    kind = ""  # of a leaf
    held: torch.Tensor | None = None
    geometry: tuple[Any, ...] = ()  # of what an operation made
    alias = False  # whether it lies in the memory of its first parent
    remade = costly = False  # by much work, so that it is held all the same where it is taken
    of_parameter = False  # whether it is a parameter, as it is or cast, cut or transposed
    made_at: int | None = None  # by which operation of its call; `OUTPUT` where the call is one operation
    given_at: int | None = None  # its position among the tensors that the model is called with
    is_rewritten = False  # whether its memory is written before the forward ends
    has_graph = False  # whether autograd knew of it when an operation took it
    carries: Sequence[TracedValue] | None = None  # of `tensor_memory`, once it was asked for

    def __init__(
        self,
        number: int,
        call: int,
        name: str,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        parents: tuple[TracedValue, ...],
        tensor: torch.Tensor,
    ):
        self.number, self.call, self.name, self.func = number, call, name, func
        self.args, self.kwargs, self.parents = args, kwargs, parents
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.numel, self.is_floating = math.prod(self.shape), tensor.dtype.is_floating_point
        self._of_fixed = all(parent.is_fixed for parent in parents)

    @property
    def is_fixed(self) -> bool:
        """Whether it was computed from no parameter, and from no numbers of the batch but whole ones."""
        return self._of_fixed and self.kind != PARAMETER and not (self.kind == INPUT and self.is_floating)

    def signature(self) -> tuple[Any, ...]:
        """What the same operation on operands with the same numbers has, in another forward."""
        taken = repr(filled((self.args, self.kwargs), lambda of: of.number))
        return self.name, self.shape, self.dtype, self.item, self.kind, taken

    def __repr__(self) -> str:
        return f"%{self.number} {self.name}{[p.number for p in self.parents]} {self.shape}"


def values_in(args: Any) -> Iterator[TracedValue]:
    """The values among the arguments of an operation."""
    if isinstance(args, TracedValue):
        yield args
    elif isinstance(args, (list, tuple)):
        for item in args:
            yield from values_in(item)
    elif isinstance(args, dict):
        for item in args.values():
            yield from values_in(item)


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


def filled(args: Any, fill: Callable[[TracedValue], Any]) -> Any:
    """Arguments with ``fill(value)`` in the place of every value."""
    if isinstance(args, TracedValue):
        return fill(args)
    if isinstance(args, (list, tuple)):
        return type(args)([filled(item, fill) for item in args])
    if isinstance(args, dict):
        return {name: filled(item, fill) for name, item in args.items()}
    return args


Node = TypeVar("Node")


def walk(starts: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """Some values, or their numbers, and all that is reached from them, each once, the nearest first."""
    found = list(dict.fromkeys(starts))
    seen = set(found)
    for of in found:  # grows while it is gone through
        yield of
        for other in following(of):
            if other not in seen:
                seen.add(other)
                found.append(other)


OUTSIDE = ModuleCall("", -1, -1, "")  # of all modules


@dataclass
class Graph:
    """The values of one forward in the order in which they were made."""

    values: list[TracedValue] = field(default_factory=list)  # by number
    calls: list[ModuleCall] = field(default_factory=list)  # by number; the first one is the model's
    outputs: list[TracedValue] = field(default_factory=list)  # what the model returned
    parameter_names: dict[int, str] = field(default_factory=dict)  # by the numbers of their values
    # The classes of all modules, called or not, by their paths
    modules: dict[str, str] = field(default_factory=dict)
    handed_on: set[int] = field(default_factory=set)  # what modules with a number, as blocks have, returned
    # By value: the calls that took or returned it, in order
    shown: dict[int, list[Shown]] = field(default_factory=dict)
    # What is a part of a tensor that is spread over processes, and how
    split: dict[int, str] = field(default_factory=dict)
    error: Exception | None = None  # why nothing was recorded from some operation on
    operations: dict[int, list[Any]] = field(default_factory=dict)  # by call, in order
    made_in: dict[int, range] = field(default_factory=dict)  # by call: what was made while it ran
    circumstances: tuple[Any, ...] = ()  # of `user_modes.circumstances`
    # By value: how many values there were when autograd first had a graph of it, where gradients are wanted.
    has_graph_from: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights: dict[int, list[TracedValue]] | None = None  # of `operations.weights`
        self._made: dict[int, torch.Tensor] = {}  # what was made again last
        self.read: set[int] = set()  # of which values the held tensor was read since the last forward
        # By number: the marks of `later`, and as far as which number they go.
        self._later: dict[int, tuple[bytearray, int]] = {}
        self._parents: list[tuple[int, ...]] = []
        # What everything is computed from that depends on the batch.
        self._given: list[TracedValue] | None = None
        self._to_output: bytearray | None = None
        self._takers: list[list[TracedValue]] | None = None
        self._by_place: dict[ValuePlace, TracedValue] = {}
        self._by_side: dict[tuple[int, str], list[TracedValue]] | None = None
        self._by_call: dict[tuple[str, int], int] = {}

    def depends(self, value: TracedValue, on: TracedValue) -> bool:
        """Whether a value was computed from another one, by whatever operations."""
        if value.number <= on.number:
            return value is on
        return bool(self._marks_until(value.number, on)[value.number])

    def later(self, on: TracedValue) -> bytearray:
        """Marks, by number, of all values that were computed from one, and of itself."""
        return self._marks_until(len(self.values) - 1, on)

    def _marks_until(self, last: int, on: TracedValue) -> bytearray:
        """The marks of `later` as far as a number: two states that follow each other do not ask for the rest of the graph."""
        marks, known = self._later.get(on.number, (None, on.number))
        if marks is None:
            marks = bytearray(len(self.values))
            marks[on.number] = 1
        parents = self._parent_numbers() if last > known else []
        for number in range(known + 1, last + 1):
            for parent in parents[number]:
                if marks[parent]:
                    marks[number] = 1
                    break
        self._later[on.number] = (marks, max(last, known))
        return marks

    def earlier(self, ends: Iterable[TracedValue], stop: Container[int] = ()) -> bytearray:
        """Marks of all values that some were computed from, and of these, as far as the numbers in ``stop``."""
        marks = bytearray(len(self.values))
        last = -1
        for end in ends:
            if end.number not in stop:
                marks[end.number] = 1
                last = max(last, end.number)
        parents = self._parent_numbers()
        for number in range(last, -1, -1):
            if marks[number]:
                for parent in parents[number]:
                    if parent not in stop:
                        marks[parent] = 1
        return marks

    def _parent_numbers(self) -> list[tuple[int, ...]]:
        if len(self._parents) != len(self.values):
            self._parents = [tuple(parent.number for parent in value.parents) for value in self.values]
        return self._parents

    def ancestors(self, numbers: Iterable[int], stop: Collection[int] = ()) -> set[int]:
        """What some values were computed from, themselves included; nothing is followed beyond ``stop``."""
        parents = self._parent_numbers()
        return set(walk(numbers, lambda number: () if number in stop else parents[number]))

    def takers(self, value: TracedValue) -> list[TracedValue]:
        """The values that were made of one."""
        if self._takers is None:
            self._takers = [[] for _ in self.values]
            for other in self.values:
                for parent in other.parents:
                    self._takers[parent.number].append(other)
        return self._takers[value.number]

    def depends_on_input(self, value: TracedValue) -> bool:
        """Whether a value was computed from the batch; True for all where the batch has no tensor."""
        if self._given is None:
            self._given = [of for of in self.values if of.kind == INPUT]
            if self._given and not any(self.depends(end, of) for end in self.outputs for of in self._given):
                # What came went through another library, as numpy, and comes back as tensors that nothing made.
                self._given = [of for of in self.values if of.kind in (INPUT, CONSTANT)]
        return not self._given or any(self.depends(value, of) for of in self._given)

    def reaches_output(self, value: TracedValue) -> bool:
        """Whether the output was computed from a value; True for all where the model returned no tensor."""
        if self._to_output is None:
            self._to_output = self.earlier(self.outputs or self.values)
        return bool(self._to_output[value.number])

    def has_origin(self, value: TracedValue) -> bool:
        """Whether a value was computed from the batch or from a parameter, and is not made of numbers alone."""
        return any(of.kind for of in walk([value], lambda of: of.parents))

    def call(self, value: TracedValue) -> ModuleCall:
        """The call in which a value was made; what is made before the model is called has one of its own."""
        return self.calls[value.call] if value.call >= 0 else OUTSIDE

    def path(self, value: TracedValue) -> str:
        """The module in whose call a value was made."""
        return self.call(value).path

    def stack(self, value: TracedValue) -> list[int]:
        """The numbers of the module calls around a value, the outermost first."""
        found, call = [], value.call
        while call >= 0:
            found.append(call)
            call = self.calls[call].parent
        return found[::-1]

    def place(self, value: TracedValue) -> ValuePlace:
        """Where a later forward makes a value again."""
        call = self.call(value)
        return ValuePlace(call.path, call.number, value.name, value.order, value.item)

    def at(self, place: ValuePlace) -> TracedValue | None:
        """The value that is made at a place; None where none is."""
        if not self._by_place:
            self._by_place = {self.place(value): value for value in self.values if value.func is not None}
        return self._by_place.get(place)

    def call_of(self, path: str, number: int) -> int:
        """The number of the k-th call of a module, among all calls.

        Raises ReadingError: Where it was not called so often.
        """
        if len(self._by_call) != len(self.calls):
            self._by_call = {(call.path, call.number): n for n, call in enumerate(self.calls)}
        found = self._by_call.get((path, number))
        if found is None:
            raise ReadingError(f"{path or 'the model'} was not called {number + 1} times")
        return found

    def shown_at(self, path: str, number: int, at: str, item: int) -> TracedValue | None:
        """The value that a call took or gave; None where it did not."""
        values = self.sides.get((self.call_of(path, number), at), [])
        return values[item] if item < len(values) else None

    @property
    def sides(self) -> dict[tuple[int, str], list[TracedValue]]:
        """The floating values that each call took ("input") and gave ("output"), in order."""
        if self._by_side is None:
            shown = [(of, self.values[number]) for number, places in self.shown.items() for of in places]
            self._by_side = {}
            for of, value in sorted(shown, key=lambda pair: pair[0].order):
                self._by_side.setdefault((of.call, of.at), []).append(value)
        return self._by_side

    def ends_of(self, call: int) -> tuple[TracedValue, TracedValue] | None:
        """The first floating value that a call took, and the first that it gave; None where either is missing."""
        taken, given = self.sides.get((call, "input")), self.sides.get((call, "output"))
        return (taken[0], given[0]) if taken and given else None

    def let_go(self) -> None:
        """Hold no tensor any more."""
        self._made.clear()
        self.read.clear()
        for value in self.values:
            value.held = None

    def take(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Hold the tensors of a later forward, by the numbers of their values."""
        self.let_go()
        for number, tensor in tensors.items():
            self.values[number].held = tensor

    def takes_over(self, later: Graph) -> bool:
        """Hold the tensors of a later forward, if it ran the same operations; whether it did."""
        is_same = len(self.values) == len(later.values) and self.operations == later.operations
        if not is_same or later.error is not None:
            return False
        pairs = list(zip(self.values, later.values, strict=True))
        if not all(a.signature() == b.signature() for a, b in pairs):
            return False
        self.let_go()
        for a, b in pairs:
            a.held, a.geometry, a.remade = b.held, b.geometry, b.remade
            a.is_rewritten |= b.is_rewritten
        self.circumstances = later.circumstances
        return True

    @staticmethod
    def is_kept(value: TracedValue) -> bool:
        """Whether the tensor of a value is there, or can be made again."""
        while value.remade and value.alias and value.held is None:
            value = value.parents[0]
        return value.remade or value.held is not None

    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value: as it was held, or made again from what was held."""
        found = self._tensor(value)
        if found is None:
            made: dict[int, torch.Tensor] = {}
            with torch.no_grad():
                for of in self._to_make(value):
                    made[of.number] = self.run(of, lambda p: made.get(p.number, self._tensor(p)))
            found = self._made[value.number] = made[value.number]
            if len(self._made) > MOST_MADE:
                del self._made[next(iter(self._made))]
        return found.detach() if found.requires_grad else found

    def _tensor(self, value: TracedValue) -> torch.Tensor | None:
        if value.held is None:
            return self._made.get(value.number)
        self.read.add(value.number)
        return value.held

    def _to_make(self, value: TracedValue) -> list[TracedValue]:
        def made_of(of: TracedValue) -> list[TracedValue]:
            if not of.remade:
                raise ReadingError(f"the value of {of!r} was not kept")
            return [p for p in of.parents if p.held is None and p.number not in self._made]

        return sorted(walk([value], made_of), key=lambda of: of.number)

    @staticmethod
    def run(value: TracedValue, operand: Callable[[TracedValue], Any], args: Any = None) -> torch.Tensor:
        """The operation of a value on other operands, and with other arguments if they are given."""
        args = list(filled(value.args if args is None else args, operand))
        kwargs = filled(value.kwargs, operand)
        if value.name in ("view", "_unsafe_view"):  # of what may lie elsewhere in another order
            return args[0].reshape(args[1])
        schema = getattr(value.func, "_schema", None)
        if schema is not None and schema.is_mutable:
            args[0] = args[0].clone()
        result = value.func(*args, **kwargs)
        return result[value.item] if isinstance(result, (tuple, list)) else result


def dropped(tensor: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """What a dropout leaves."""
    return tensor * mask * scale
