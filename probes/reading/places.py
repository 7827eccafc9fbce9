"""Which operations of a later forward give what is read? Their places, found once, and a mode that is on only around them.

An operation is known by its call and by how many operations ran in that call before it, other calls inside of it not counted.
In the calls that have a place every operation is compared with the one that was recorded there; the others run without a mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode, _push_mode

from depthscope.probes.model.user_modes import circumstances
from depthscope.probes.reading.graph import FILLS, OUTPUT, Graph, ReadingError, TracedValue
from depthscope.probes.reading.operations import decomposed, operation_of
from depthscope.probes.reading.tensor_memory import detached

OTHER = "other operations ran in {} than in the forward that was read; later forwards are recorded in full"


@dataclass
class OperationPlaces:
    """Where later forwards make the values that are needed of them."""

    graph: Graph  # of the forward that was read
    circumstances: tuple[Any, ...]
    # By call and number of an operation in it: the values that it makes; by `OUTPUT`: what the call returns
    wanted: dict[int, dict[int, list[TracedValue]]] = field(default_factory=dict)
    # By position among what the model is called with
    given: dict[int, TracedValue] = field(default_factory=dict)
    constant: list[tuple[TracedValue, torch.Tensor]] = field(default_factory=list)
    of_model: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls = {(call.path, call.number): number for number, call in enumerate(self.graph.calls)}

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, needed: Collection[int]) -> OperationPlaces | None:
        """The places of values, by their numbers; None where one of them has none."""
        places = cls(graph, graph.circumstances)
        own = {
            id(tensor): (module, name, tensor)
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        }
        for value in (graph.values[number] for number in sorted(needed)):
            of_model = own.get(id(value.held))
            if value.made_at is not None:
                places.wanted.setdefault(value.call, {}).setdefault(value.made_at, []).append(value)
                continue
            if value.given_at is not None:
                places.given[value.given_at] = value
            elif value.held is not None and (of_model is not None or value.name in FILLS):
                places.constant.append((value, value.held))
            else:
                return None
            places.of_model += [of_model] if of_model is not None else []
        return places


class _Frame:
    """A call that is running: its path, and, where it has places, its operations and how many of them ran."""

    __slots__ = ("count", "number", "operations", "path", "wanted")

    def __init__(
        self, path: str, number: int, operations: Sequence[Any], wanted: dict[int, list[TracedValue]] | None
    ):
        self.path, self.number, self.operations, self.wanted = path, number, operations, wanted
        self.count = 0

    @property
    def is_watched(self) -> bool:
        """Whether some of its own operations make what is needed."""
        return self.wanted is not None and any(place != OUTPUT for place in self.wanted)


class PlacedRecorder(TorchDispatchMode):
    """The tensors of a later forward, called with those of ``batch``, at known places; the graph gets them at the end."""

    def __init__(self, places: OperationPlaces, batch: Sequence[torch.Tensor]):
        super().__init__()
        self._places, self.graph = places, places.graph
        self._found: dict[int, torch.Tensor] = {value.number: tensor for value, tensor in places.constant}
        self._waiting: list[tuple[TracedValue, torch.Tensor]] = []
        self._stack: list[_Frame] = []
        self._calls: dict[str, int] = {}
        self._made = 0  # the identity of what the last operation made
        self._running, self._is_on = False, False
        self.error: str | None = None
        # As in `GraphRecorder`.
        self.on_taken: Callable[[TracedValue, torch.Tensor], None] | None = None
        self.on_value: Callable[[TracedValue, torch.Tensor], object] | None = None
        for position, value in places.given.items():
            self._found[value.number] = batch[position]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `GraphRecorder`

    def __enter__(self) -> PlacedRecorder:
        self._running = True
        self._switch()
        return self

    def __exit__(self, *error: Any) -> None:
        self._running = False
        self._switch()

    def _switch(self) -> None:
        """Turn the mode on in calls that have places, and off in others, also where others were turned on since."""
        on = self._running and self.error is None and bool(self._stack) and self._stack[-1].is_watched
        if on and not self._is_on:
            super().__enter__()
            self._is_on = True
        elif self._is_on and not on:
            above = []
            while _get_current_dispatch_mode() not in (self, None):
                above.append(_pop_mode())
            super().__exit__(None, None, None)
            self._is_on = False
            for mode in reversed(above):
                _push_mode(mode)

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        self._hand_over()
        number = self._calls[path] = self._calls.get(path, -1) + 1
        call = self._places.calls.get((path, number), -1)
        wanted = self._places.wanted.get(call)
        operations = () if wanted is None else self.graph.operations.get(call, ())
        self._stack.append(_Frame(path, call, operations, wanted))
        self._switch()

    def leave(self, path: str, output: Any) -> None:
        """Note that a call has ended, and what it returned."""
        self._hand_over()
        while self._stack and self._stack[-1].path != path:  # what raised, and was caught by the model
            self._stack.pop()
        if not self._stack:
            return
        frame = self._stack.pop()
        if frame.is_watched and frame.count != len(frame.operations):
            self._stop(path)
        for value in () if frame.wanted is None else frame.wanted.get(OUTPUT, ()):
            if isinstance(output, torch.Tensor):
                self._take(value, output)
                self._hand_over()
        self._switch()

    def end(self, output: Any) -> Graph:
        """The graph, which has the tensors of this forward."""
        self._hand_over()
        every = (value for of in self._places.wanted.values() for values in of.values() for value in values)
        if (missing := next((value for value in every if value.number not in self._found), None)) is not None:
            self._stop(self.graph.path(missing))
        return self.graph

    def hold(self) -> None:
        """Let the graph have the tensors of this forward; ReadingError where other operations ran."""
        if self.error is not None:
            raise ReadingError(self.error)
        self.graph.take(self._found)

    def _stop(self, path: str) -> None:
        if self.error is None:
            self.error = OTHER.format(path or "the model")

    def _hand_over(self) -> None:
        """Tell of what was made since: it has its place in autograd's graph by now."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            if self.on_taken is not None:
                for value, tensor in waiting:
                    self.on_taken(value, tensor)

    def _take(self, value: TracedValue, tensor: torch.Tensor) -> None:
        # Zeros are written next, and the graph that was read had them without memory: it did not see that.
        self._found[value.number] = detached(tensor, copy=value.is_rewritten or value.name in FILLS)
        self._waiting.append((value, tensor))
        if self.on_value is not None:
            self.on_value(value, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and take what it made where that is needed."""
        frame = self._stack[-1] if self._stack else None
        if frame is None or frame.wanted is None or self.error is not None:
            return func(*args, **(kwargs or {}))
        if self._waiting:
            self._hand_over()
        count, operations = frame.count, frame.operations
        is_known = count < len(operations) and operations[count] is func
        if not is_known and operation_of(func).is_composite:
            return decomposed(self, func, args, kwargs or {})
        if not is_known and func is torch.ops.aten.detach.default and id(args[0]) == self._made:
            # Torch's Python detaches what `empty_like`, … made where somebody keeps it, as `_take` does.
            return func(*args)
        frame.count += 1
        result = func(*args, **kwargs) if kwargs else func(*args)
        self._made = id(result)
        if not is_known:
            self._stop(frame.path)
            return result
        for value in frame.wanted.get(count, ()):
            made = result[value.item] if isinstance(result, (tuple, list)) else result
            if tuple(made.shape) == value.shape:
                self._take(value, made)
            else:
                self._stop(frame.path)
        return result


class KnownPlaces:
    """The places of what a session measures, once two forwards after each other ran the same operations.

    Where a later one ran others all the same, as experts that loop over the tokens they were given, every forward is recorded
    in full from then on: at known places its connections would be lost.
    """

    def __init__(self) -> None:
        self.places: OperationPlaces | None = None
        self._is_given_up = False
        self._before: dict[int, list[Any]] | None = None

    def recorder(self, model: nn.Module, batch: Sequence[torch.Tensor]) -> PlacedRecorder | None:
        """A recorder for a forward that begins; None where every operation has to be recorded."""
        places = self.places
        if places is None or circumstances(model, batch) != places.circumstances:
            return None
        is_same = all(
            module._parameters.get(name, module._buffers.get(name)) is tensor
            for module, name, tensor in places.of_model
        )
        return PlacedRecorder(places, batch) if is_same else None

    def learn(self, model: nn.Module, graph: Graph, needed: Collection[int]) -> None:
        """Find the places of what was needed of a forward that was recorded in full."""
        if not self._is_given_up:
            is_same, self._before = self._before == graph.operations, graph.operations
            self.places = OperationPlaces.of(model, graph, needed) if is_same else None

    def forget(self, *, for_good: bool = False) -> None:
        """Record forwards in full again."""
        self.places, self._before, self._is_given_up = None, None, for_good
