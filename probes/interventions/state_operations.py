"""Which operation makes a state, and how is the state changed there? In the state's own memory, when it has just been written.

A state may be used by code that no hook sees: the skip around a block, a mixing in a loop. So it is changed where it is made:
at the last operation that writes into its memory before it is shown. Every later reader then
finds the changed values. Operations are counted within the module call that makes them, by name and shape: the experts that
ran in another module do not move the count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.reading.recording import recording

Depth: TypeAlias = tuple[int, int]  # the number of a chain, and a depth of it
READ: Final = "read"
Read: TypeAlias = tuple[Literal["read"], int]  # what a branch reads, by the number of its connection


class Operation(NamedTuple):
    """One operation of a forward, in a form that finds it again in another forward of the same model."""

    path: str  # of the module that runs it
    call: int  # of that module, in this forward
    name: str
    shape: tuple[int, ...]  # of what it makes
    result: int  # which of its results
    turn: int  # among such operations of this call


@dataclass(frozen=True)
class Birthplace:
    """Where a state is made: the operation, and the place of the state in its memory."""

    operation: Operation
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def view(self, written: torch.Tensor) -> torch.Tensor:
        """The state in the memory of what the operation wrote."""
        return written.as_strided(self.size, self.stride, self.offset)

    @property
    def repeats(self) -> bool:
        """Whether one number in memory stands for several entries of the state, as after ``expand``."""
        return any(step == 0 and size > 1 for size, step in zip(self.size, self.stride, strict=True))


Change: TypeAlias = Callable[[Depth | Read, torch.Tensor], torch.Tensor]


class StateOperations:
    """Follows which operation wrote which memory, and changes states where they are made, in forwards made inside of `on`.

    ``model``: the model.
    ``places``: the states and reads that are met; none where they are only looked for.
    ``change``: ``change((chain, depth), state)`` returns the state to go on with, in the model's layout, or the
    tensor that came.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[Any, Birthplace] | None = None,
        change: Change | None = None,
    ) -> None:
        self.met: Counter[Depth | Read] = Counter()
        self._change = change
        # Called with everything that an operation makes, after the changes.
        self.on_made: Callable[[TracedValue, torch.Tensor], None] | None = None
        self._at: dict[Operation, list[tuple[Depth | Read, Birthplace]]] = {}
        for depth, place in (places or {}).items():
            self._at.setdefault(place.operation, []).append((depth, place))
        self._recorder = GraphRecorder(model, (), holds=False)
        self._recorder.on_value = self._made
        self._turns: Counter[tuple[Any, ...]] = Counter()
        self._operations: dict[int, Operation] = {}  # by the number of what they made

    def listen(self, listener: Callable[[Any, Any, Any, Any], None]) -> None:
        """Give every operation of the forward, with what it took and gave, to one more function."""
        self._recorder.listeners.append(listener)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Follow the operations of the forward made inside; nothing is left on the model afterwards."""
        with recording(self._recorder):
            yield
        if self._recorder.graph.error is not None:
            raise self._recorder.graph.error

    def _made(self, value: TracedValue, tensor: torch.Tensor) -> None:
        if not _is_view(value):
            self._written(value, tensor)
        if self.on_made is not None:
            self.on_made(value, tensor)

    def _written(self, value: TracedValue, tensor: torch.Tensor) -> None:
        call = self._recorder.graph.call(value)
        kind = call.path, call.number, value.name, value.shape, value.item
        operation = self._operations[value.number] = Operation(*kind, self._turns[kind])
        self._turns[kind] += 1
        for depth, place in self._at.get(operation, ()):
            self.met[depth] += 1
            if self._change is not None:
                _write(place, tensor, self._change, depth)

    def birthplace(self, state: torch.Tensor) -> Birthplace | None:
        """Where a state that is shown now was made; None where no operation of the forward made it."""
        value = self._recorder.known(state)
        while _is_view(value) or value.name == "patch":
            # Of memory that was written in part, the last write.
            value = value.args[1] if value.name == "patch" else value.parents[0]
        operation = self._operations.get(value.number)
        if operation is None:
            return None
        return Birthplace(
            operation, tuple(state.shape), tuple(state.stride()), int(state.storage_offset()), state.dtype
        )


def _is_view(value: TracedValue) -> bool:
    """Whether a value lies in the memory of what it was made of."""
    return value.alias or value.name == "_unsafe_view"


def _write(place: Birthplace, written: torch.Tensor, change: Change, depth: Depth | Read) -> None:
    state = place.view(written)
    changed = change(depth, state)
    if changed is state:
        return
    if place.repeats:
        # One number in memory for several entries: it can be written only where these are to be equal.
        first = tuple(slice(0, 1) if step == 0 else slice(None) for step in place.stride)
        if not torch.equal(changed[first].expand_as(changed), changed):
            raise CaptureError(
                f"the state at depth {depth[1]} is one tensor seen several times (expand), so that its streams cannot differ; "
                "expected a change at a later depth"
            )
        state, changed = state[first], changed[first]
    state.copy_(changed)
