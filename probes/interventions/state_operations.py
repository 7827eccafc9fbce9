"""Which operations make a state, and how is the state changed there? In its own memory, when it has just been written.

A state may be used by code that no hook sees: the skip around a block, a mixing in a loop. So it is changed where it is made:
at the last operation that writes into its memory before it is shown. Every later reader then
finds the changed values. Operations are counted within the module call that makes them, by name and shape: the experts that
ran in another module do not move the count. A state whose streams are tensors of their own is changed when the last of them
has been made; what read one of them before that and is no part of the state itself would miss the change: it is looked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from depthscope.probes.connections.proof import relative_error
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.operations import is_read_early, is_view
from depthscope.probes.reading.recorder import GraphRecorder, recording

# Of two forwards of one batch: sums of a device in another order. A heuristic of ours.
REPEATED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def repeats(one: Any, other: Any) -> bool:
    """Whether two outputs of the same batch are equal up to the rounding of sums in another order."""
    if same_values(one, other):
        return True
    return all(
        a.dtype in REPEATED
        and a.shape == b.shape
        and relative_error(a.double() - b.double(), a.double()) <= REPEATED[a.dtype]
        for a, b in zip(tensors_in(one), tensors_in(other), strict=True)
        if not same_values(a, b)
    )


def same_values(one: Any, other: Any) -> bool:
    """Whether two outputs have the same numbers, bit for bit; undefined ones count as equal."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    return all(a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


Depth: TypeAlias = tuple[int, int]  # the number of a chain, and a depth of it


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


StatePlace: TypeAlias = tuple[Birthplace, ...]
"""Where a state is made: the one tensor that holds it, or one for each stream."""
Change: TypeAlias = Callable[[Depth, torch.Tensor], torch.Tensor]


class StateOperations:
    """Follows which operation wrote which memory, and changes states where they are made, in forwards made inside of `on`.

    ``model``: the model.
    ``places``: the states that are met; none where they are only looked for.
    ``change``: ``change((chain, depth), state)`` returns the state to go on with, in the model's layout, or the
    tensor that came.
    """

    def __init__(
        self, model: nn.Module, places: Mapping[Any, StatePlace] | None = None, change: Change | None = None
    ) -> None:
        self.met: Counter[Depth] = Counter()
        self._change = change
        self._places = places or {}
        self._at: dict[Operation, list[tuple[Depth, int]]] = {}
        for depth, place in self._places.items():
            for part, of in enumerate(place):
                self._at.setdefault(of.operation, []).append((depth, part))
        # What was written of states, of which each part may be made by another operation.
        self._parts: dict[Depth, dict[int, torch.Tensor | None]] = {}
        self._recorder = GraphRecorder(model, (), holds=False)
        self._recorder.on_value = self._written
        self._turns: Counter[tuple[Any, ...]] = Counter()
        self._operations: dict[int, Operation] = {}  # by the number of what they made

    @contextmanager
    def on(self) -> Iterator[None]:
        """Follow the operations of the forward made inside; nothing is left on the model afterwards."""
        with recording(self._recorder):
            yield
        if self._recorder.graph.error is not None:
            raise self._recorder.graph.error

    def _written(self, value: TracedValue, tensor: torch.Tensor) -> None:
        if is_view(value):
            return
        call = self._recorder.graph.call(value)
        kind = call.path, call.number, value.name, value.shape, value.item
        operation = self._operations[value.number] = Operation(*kind, self._turns[kind])
        self._turns[kind] += 1
        for depth, part in self._at.get(operation, ()):
            parts, place = self._parts.setdefault(depth, {}), self._places[depth]
            is_again = part in parts
            parts[part] = tensor
            if len(parts) < len(place):
                continue
            self.met[depth] += 1
            if not is_again and self._change is not None:
                _write(place, parts, self._change, depth)
            self._parts[depth] = dict.fromkeys(parts)  # the memory is the model's

    def _place(self, state: torch.Tensor, made: TracedValue) -> Birthplace | None:
        operation = self._operations.get(made.number)
        if operation is None:
            return None
        return Birthplace(
            operation, tuple(state.shape), tuple(state.stride()), int(state.storage_offset()), state.dtype
        )

    def _made_as(self, state: torch.Tensor) -> TracedValue:
        """What wrote the memory of a tensor; of memory that was written in part, the last write."""
        value = self._recorder.known(state)
        while is_view(value) or value.name == "patch":
            value = value.args[1] if value.name == "patch" else value.parents[0]
        return value

    def state_place(self, tensors: Sequence[torch.Tensor], before: int) -> tuple[StatePlace | None, int]:
        """Where a state that is shown now was made, and the number of the value with which it was there.

        ``tensors``: that hold it.
        ``before``: that number of the state before; −1 for the first one.
        Returns: None for the place where no operation made one of them, or one of them was read between the state before
        and this one by what is no part of this one.
        """
        made = [self._made_as(tensor) for tensor in tensors]
        found = map(self._place, tensors, made)
        places = [place for place in found if place is not None]
        last = max(value.number for value in made)
        if len(places) < len(tensors):
            return None, last
        early = is_read_early(self._recorder.graph, made, before)
        return None if early else tuple(places), last


def _write(
    place: StatePlace, written: Mapping[int, torch.Tensor | None], change: Change, depth: Depth
) -> None:
    tensors = [
        of.view(memory)
        for of, (_, memory) in zip(place, sorted(written.items()), strict=True)
        if memory is not None
    ]
    state = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
    changed = change(depth, state)
    if changed is state:
        return
    wanted = list(changed) if len(tensors) > 1 else [changed]
    for tensor, new in zip(tensors, wanted, strict=True):
        # One number in memory may hold several entries: those can be written only where they are to be equal.
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
        tensor[once].copy_(new[once])
    if not same_values(tensors, wanted):
        raise InterventionError(
            f"the state at depth {depth[1]} is one tensor seen several times (expand, or a list of the same), so that its "
            "streams cannot differ; expected a change of all streams, or at a later depth"
        )
