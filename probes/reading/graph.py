"""What was computed from what in one forward? Values, the operations that made them, the module calls around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from depthscope.probes.model.errors import CaptureError


def names(text: str) -> frozenset[str]:
    """The names of operations in a text."""
    return frozenset(text.split())


LEAF = "leaf"  # the name of a value that no operation of the forward made
PARAMETER, INPUT, CONSTANT = "parameter", "input", "constant"
# What takes only the shape of its operand.
SHAPE_ONLY = names(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided rand_like "
    "randn_like bernoulli"
)
# What a value is made again by, where its tensor is gone: it costs little, and changes nothing.
REMADE = names(
    "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice narrow split "
    "split_with_sizes select unbind alias detach clone _to_copy neg diagonal index_select index gather native_layer_norm "
    "_fused_rms_norm native_group_norm relu gelu silu leaky_relu elu hardswish hardtanh sigmoid tanh mish softplus clamp "
    "zeros ones full arange"
)


class ReadingError(CaptureError):
    """No residual memory, or one that cannot be described."""


class ValuePlace(NamedTuple):
    """Where a later forward makes a value again: the k-th operation of its name in a call, and which of its results."""

    module: str
    call: int  # of the module's calls in one forward
    operation: str
    order: int
    result: int


class ModuleCall(NamedTuple):
    """One call of a module."""

    path: str
    number: int  # among the calls of the module
    parent: int  # the number of the call around it; -1 for the model's own
    kind: str  # the module's class


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where the elements of a tensor lie in its memory: shape, stride, offset."""
    if tensor.layout is not torch.strided:
        return tuple(tensor.shape), (), 0
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


class TracedValue:
    """What one operation made; `held` is its tensor where that may be needed to run carried steps again."""

    __slots__ = (
        "alias",
        "args",
        "call",
        "dtype",
        "func",
        "geometry",
        "held",
        "item",
        "kind",
        "kwargs",
        "name",
        "number",
        "order",
        "parents",
        "shape",
    )  # fmt: skip

    def __init__(
        self, number: int, name: str, func: Any, args: Any, kwargs: Any, tensor: torch.Tensor, call: int
    ):
        self.number, self.name, self.func, self.call = number, name, func, call
        self.args, self.kwargs = args, kwargs
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.item = self.order = 0
        self.kind = ""
        self.geometry = geometry(tensor)
        self.alias = False  # whether it lies in the memory of its first parent
        self.held: torch.Tensor | None = None
        self.parents: tuple[TracedValue, ...] = ()
        if name not in SHAPE_ONLY:
            self.parents = tuple(dict.fromkeys((*values_in(args), *values_in(kwargs))))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_floating(self) -> bool:
        """Whether its elements are real numbers."""
        return self.dtype.is_floating_point

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


def filled(args: Any, fill: Callable[[TracedValue], Any]) -> Any:
    """Arguments with ``fill(value)`` in the place of every value."""
    if isinstance(args, TracedValue):
        return fill(args)
    if isinstance(args, (list, tuple)):
        return type(args)([filled(item, fill) for item in args])
    if isinstance(args, dict):
        return {name: filled(item, fill) for name, item in args.items()}
    return args


@dataclass
class Graph:
    """The values of one forward in the order in which they were made.

    Parameters
    ----------
    values : list of TracedValue
        By number.
    calls : list of ModuleCall
        Module calls by number; the first one is the model's.
    outputs : list of TracedValue
        What the model returned.
    parameter_names : dict of int to str
        By the numbers of values that are parameters.
    modules : dict of str to str
        The classes of all modules by their paths, whether they were called or not.
    handed_on : set of int
        Numbers of the values that modules with a number, as blocks have, returned.
    """

    values: list[TracedValue] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    outputs: list[TracedValue] = field(default_factory=list)
    parameter_names: dict[int, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    handed_on: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._asked: dict[int, int] = {}
        self._later: dict[int, bytearray] = {}
        self._from_input: bytearray | None = None
        self._to_output: bytearray | None = None

    def depends(self, value: TracedValue, on: TracedValue) -> bool:
        """Whether a value was computed from another one, by whatever operations."""
        if value.number <= on.number:
            return value is on
        known = self._later.get(on.number)
        if known is None:
            asked = self._asked[on.number] = self._asked.get(on.number, 0) + 1
            if asked <= 3:  # a search is cheaper than marking everything, as long as few ask
                return self._search(value, on.number)
            known = self._later[on.number] = self._marked([on])
        return bool(known[value.number])

    def depends_on_input(self, value: TracedValue) -> bool:
        """Whether a value was computed from the batch; True for all where the batch has no tensor."""
        if self._from_input is None:
            given = [v for v in self.values if v.kind == INPUT]
            self._from_input = self._marked(given) if given else bytearray(b"\1" * len(self.values))
        return bool(self._from_input[value.number])

    def reaches_output(self, value: TracedValue) -> bool:
        """Whether the output was computed from a value; True for all where the model returned no tensor."""
        if self._to_output is None:
            marks = self._to_output = bytearray(len(self.values))
            waiting = list(self.outputs) or self.values[:]
            while waiting:
                of = waiting.pop()
                if not marks[of.number]:
                    marks[of.number] = 1
                    waiting += of.parents
        return bool(self._to_output[value.number])

    def has_own_weights(self, value: TracedValue) -> bool:
        """Whether a value that does not reach the output was made by a parameter that works in nothing that does."""
        seen, waiting = {value.number}, [value]
        while waiting:
            of = waiting.pop()
            if of.kind == PARAMETER and not self.reaches_output(of):
                return True
            new = [p for p in of.parents if p.number not in seen and not self.reaches_output(p)]
            seen.update(p.number for p in new)
            waiting += new
        return False

    def has_origin(self, value: TracedValue) -> bool:
        """Whether a value was computed from the batch or from a parameter, and is not made of numbers alone."""
        seen, waiting = set(), [value]
        while waiting:
            of = waiting.pop()
            if of.kind:
                return True
            if of.number not in seen:
                seen.add(of.number)
                waiting += of.parents
        return False

    def _marked(self, origins: list[TracedValue]) -> bytearray:
        marks = bytearray(len(self.values))
        for origin in origins:
            marks[origin.number] = 1
        for value in self.values[min(origin.number for origin in origins) + 1 :]:
            for parent in value.parents:
                if marks[parent.number]:
                    marks[value.number] = 1
                    break
        return marks

    @staticmethod
    def _search(value: TracedValue, origin: int) -> bool:
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            for parent in waiting.pop().parents:
                if parent.number == origin:
                    return True
                if parent.number > origin and parent.number not in seen:
                    seen.add(parent.number)
                    waiting.append(parent)
        return False

    def path(self, value: TracedValue) -> str:
        """The module in whose call a value was made."""
        return self.calls[value.call].path

    def stack(self, value: TracedValue) -> list[int]:
        """The numbers of the module calls around a value, the outermost first."""
        found, call = [], value.call
        while call >= 0:
            found.append(call)
            call = self.calls[call].parent
        return found[::-1]

    def place(self, value: TracedValue) -> ValuePlace:
        """Where a later forward makes a value again."""
        call = self.calls[value.call]
        return ValuePlace(call.path, call.number, value.name, value.order, value.item)

    def is_kept(self, value: TracedValue) -> bool:
        """Whether the tensor of a value is there, or can be made again."""
        if value.held is not None or value.name in SHAPE_ONLY:
            return True
        return value.func is not None and value.name in REMADE and all(self.is_kept(p) for p in value.parents)

    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value: as it was held, or made again from what it is a view, a norm or a shape of."""
        if value.held is not None:
            return value.held
        if value.name in SHAPE_ONLY and not value.name.startswith(("rand", "bernoulli")):
            return value.func(*filled(value.args, _blank), **value.kwargs)
        if value.func is None or value.name not in REMADE:
            raise ReadingError(f"the value of {value!r} was not kept")
        result = value.func(*filled(value.args, self.tensor), **filled(value.kwargs, self.tensor))
        return result[value.item] if isinstance(result, (tuple, list)) else result


def _blank(value: TracedValue) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype)
