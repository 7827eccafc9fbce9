"""Which operation makes a state, and how is the state changed there? In the state's own memory, when it has just been written.

A state may be used by code that no hook sees: the skip around a block, a mixing in a loop. So it is changed where it is made:
at the last operation that writes into its memory before a module or the trace of the forward shows it. Every later reader then
finds the changed values. Operations are counted within the module call that makes them, by name and shape: the experts that
ran in another module do not move the count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment
from depthscope.probes.model.tensors import tensors_in

Depth: TypeAlias = tuple[int, int]  # the number of a chain, and a depth of it


class Operation(NamedTuple):
    """One operation of a forward, in a form that finds it again in another forward of the same model."""

    path: str  # of the module that runs it
    call: int  # of that module, in this forward
    name: str
    shape: tuple[int, ...]  # of what it writes first
    turn: int  # among such operations of this call


@dataclass(frozen=True)
class Birthplace:
    """Where a state is made: the operation, which of its results, and the place of the state in that memory."""

    operation: Operation
    result: int
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


Change: TypeAlias = Callable[[Depth, torch.Tensor], torch.Tensor]


class StateOperations(TorchDispatchMode):
    """Follows which operation wrote which memory, and changes states where they are made; on while a forward runs.

    Parameters
    ----------
    places : mapping of Depth to Birthplace, optional
        The states that are met; none where they are only looked for.
    change : callable, optional
        ``change((chain, depth), state)`` returns the state to go on with, in the model's layout, or the tensor that came.
    """

    def __init__(
        self, places: Mapping[Depth, Birthplace] | None = None, change: Change | None = None
    ) -> None:
        super().__init__()
        self.met: Counter[Depth] = Counter()
        self.error: Exception | None = None
        self._change = change
        self._at: dict[Operation, list[tuple[Depth, Birthplace]]] = {}
        for depth, place in (places or {}).items():
            self._at.setdefault(place.operation, []).append((depth, place))
        self._frames: list[tuple[str, int]] = [("", -1)]
        self._calls: Counter[str] = Counter()
        self._turns: Counter[tuple[Any, ...]] = Counter()
        # By the address of the memory: memory that is given out again is written again before anybody reads it.
        self._writers: dict[int, tuple[Operation, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `dataflow.trace.Trace`

    # --- the running module

    def attach(self, model: nn.Module) -> Attachment:
        """Follow which module runs, by hooks that leave with the attachment."""
        attachment = Attachment(self._report)
        paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            path = paths[id(module)]
            self._frames.append((path, self._calls[path]))
            self._calls[path] += 1

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if len(self._frames) > 1:
                self._frames.pop()

        for module in model.modules():
            attachment.before(module, enter, first=True, computes=False)
            attachment.after(module, leave, always=True, computes=False)
        return attachment

    def _report(self, error: Exception) -> None:
        self.error = self.error or error

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; note what it wrote, and change the states that it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = written_by(func, args, kwargs, result)
        if written:
            self._note(str(func), written)
        return result

    def _note(self, name: str, written: Sequence[torch.Tensor]) -> None:
        path, call = self._frames[-1]
        shape = tuple(written[0].shape)
        turn = self._turns[path, call, name, shape]
        self._turns[path, call, name, shape] += 1
        operation = Operation(path, call, name, shape, turn)
        for number, tensor in enumerate(written):
            self._writers[_address(tensor)] = operation, number
        for depth, place in self._at.get(operation, ()):
            self.met[depth] += 1
            if self._change is not None:
                _write(place, written[place.result], self._change, depth)

    def birthplace(self, state: torch.Tensor) -> Birthplace | None:
        """Where a state that is shown now was made; None where no operation of the forward made it."""
        writer = self._writers.get(_address(state)) if _has_memory(state) else None
        if writer is None:
            return None
        return Birthplace(
            *writer, tuple(state.shape), tuple(state.stride()), int(state.storage_offset()), state.dtype
        )


def _write(place: Birthplace, written: torch.Tensor, change: Change, depth: Depth) -> None:
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


def written_by(func: Any, args: Any, kwargs: Any, result: Any) -> list[torch.Tensor]:
    """The tensors whose memory an operation wrote: those that it changes in place, or made anew."""
    schema = func._schema
    if schema.is_mutable:
        named = [
            kwargs.get(argument.name) if number >= len(args) else args[number]
            for number, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return [tensor for tensor in tensors_in(named) if _has_memory(tensor)]
    taken = {_address(tensor) for tensor in tensors_in((args, kwargs)) if _has_memory(tensor)}
    return [tensor for tensor in tensors_in(result) if _has_memory(tensor) and _address(tensor) not in taken]


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def following(model: nn.Module, operations: StateOperations) -> Iterator[None]:
    """Follow the operations of the forwards made inside; nothing is left on the model afterwards."""
    attachment = operations.attach(model)
    try:
        with operations:
            yield
        if operations.error is not None:
            raise operations.error
    finally:
        attachment.remove()
