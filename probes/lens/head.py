"""What turns the last state into the output? The model's own operations after it, recorded once and proven on other data.

No norm or unembedding is looked for by name. Every operation that depends on the last state is recorded; run again on that
state it must give the output, and on the last state of *other* sequences the output of those: so nothing else of the forward
(an earlier depth, the ids) is read on the way. Merging of streams, final norm, unembedding, scaling and soft caps are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.interventions.model_under_test import InterventionError, ModelUnderTest
from depthscope.probes.interventions.predictions import Pick, by_token, named_logits
from depthscope.probes.interventions.state_operations import written_by
from depthscope.probes.model.tensors import tensors_in

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""``head(state)``: logits (B, T, V) from a state (B, T, N, D)."""

# Of the logits run again: the same operations in the same precision on the same shapes; a heuristic of ours.
HEAD_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HINT = (
    "pass head=lambda state: …, the final norm and the unembedding of the model, which gets a state (B, T, D)"
)


class HeadError(InterventionError):
    """A head that cannot be found, or that does not give the model's output."""


class Slot(NamedTuple):
    """A tensor that depends on the last state, by its number."""

    number: int


class _Step(NamedTuple):
    function: Any
    args: Any
    kwargs: Any
    made: tuple[int, ...]  # slots of the tensors in its result


class HeadRecording(TorchDispatchMode):
    """Records every operation that depends on one tensor, from the moment on that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.state: torch.Tensor | None = None
        self.refused = ""
        self._steps: list[_Step] = []
        self._slots: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # the id of a freed tensor is given out again

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def start(self, state: torch.Tensor) -> None:
        """Record what depends on this tensor from now on."""
        self._steps, self._slots, self._kept = [], {}, []
        self.state = state.detach().clone()  # it may be written in place
        self._slot(state)

    def _slot(self, tensor: torch.Tensor) -> int:
        found = self._slots.get(id(tensor))
        if found is None:
            found = self._slots[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it where it depends on the state."""
        kwargs = kwargs or {}
        if not self._kept:
            return func(*args, **kwargs)
        taken = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self._slots]
        if not taken:
            return func(*args, **kwargs)
        described = self._described(args), self._described(kwargs)
        result = func(*args, **kwargs)
        written = written_by(func, args, kwargs, result) if func._schema.is_mutable else []
        if any(id(tensor) not in self._slots for tensor in written):
            # A buffer of the model's would be written again at every replay.
            self.refused = f"{func} writes what it computes from the state into memory that was there before"
        self._steps.append(
            _Step(func, *described, tuple(self._slot(tensor) for tensor in tensors_in(result)))
        )
        return result

    def _described(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Slot(self._slots[id(value)]) if id(value) in self._slots else value
        if isinstance(value, dict):
            return {name: self._described(item) for name, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._described(item) for item in value)
        return value

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from the state."""
        return id(tensor) in self._slots

    def replay(self, state: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the target would have been for another state, in the model's own layout; with a graph where that has one."""
        values: dict[int, torch.Tensor] = {0: state.clone()}  # the head may write into it
        for step in self._steps:
            result = step.function(*_filled(step.args, values), **_filled(step.kwargs, values))
            values |= dict(zip(step.made, tensors_in(result), strict=True))
        return values[self._slots[id(target)]]


def _filled(value: Any, values: Mapping[int, torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return values[value.number]
    if isinstance(value, dict):
        return {name: _filled(item, values) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, values) for item in value)
    return value


def find_head(model: ModelUnderTest, pick: Pick | None = None) -> Head:
    """The operations from the last state of the chain to the logits.

    Returns: For states of this batch's shape; differentiable.
    Raises HeadError: Where the output does not depend on the last state alone.
    """
    recording, last = HeadRecording(), len(model.chain.points) - 1

    def shown(depth: int, tensor: torch.Tensor) -> None:
        if depth == last:
            recording.start(tensor)

    target = _logits(model.observed(recording, shown), pick)
    if recording.state is None or not recording.knows(target):
        raise HeadError(f"the output was not seen to be computed from the last state of the chain; {HINT}")
    if recording.refused:
        raise HeadError(f"{recording.refused}, so that the head cannot be run on other states; {HINT}")
    like = recording.state

    def head(state: torch.Tensor) -> torch.Tensor:
        # The graph, where there is one, goes through the rearrangement.
        return by_token(recording.replay(model.native(state, like), target), model.structure.batch_axis)

    require_head(head, model, pick)
    return head


def _logits(output: Any, pick: Pick | None) -> torch.Tensor:
    if pick is not None:
        return pick(output)
    named = named_logits(output)
    if named is not None:
        return named
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.ndim >= 2]
    if not tensors:
        raise HeadError(f"the output has no floating tensor; {HINT}")
    return tensors[0]


def require_head(head: Head, model: ModelUnderTest, pick: Pick | None) -> None:
    """Require that a head gives the output from the last state: of the batch, and of the same sequences in another order."""
    last = len(model.chain.points) - 1
    _compare(head, model.base.states[last], model.values(model.base.output, pick), "")
    other = rearranged_batch(model.batch, len(model.base.states[last]), model.structure.batch_axis)
    if other is None:
        raise HeadError(
            "the head is proven on other sequences, and the batch has one; call the model with at least two sequences"
        )
    seen: dict[int, torch.Tensor] = {}

    def shown(depth: int, tensor: torch.Tensor) -> None:
        if depth == last:
            seen[depth] = model.canonical(tensor).clone()

    output = model.observed(HeadRecording(), shown, other)
    _compare(head, seen[last], model.values(output, pick), " of other sequences")


def _compare(head: Head, state: torch.Tensor, logits: torch.Tensor, which: str) -> None:
    with torch.no_grad():
        found = head(state)
    if found.shape != logits.shape:
        raise HeadError(
            f"the head gives shape {tuple(found.shape)}, the output has {tuple(logits.shape)}; {HINT}"
        )
    error = relative_error(found.double() - logits.double(), logits.double())
    limit = HEAD_ERROR.get(state.dtype, HEAD_ERROR[torch.float32])
    if not error <= limit:
        raise HeadError(
            f"applied to the last state{which}, the head misses the output by a relative error of {error:.1e} (limit "
            f"{limit:.0e}): the output is computed from more than the last state; {HINT}"
        )


def rearranged_batch(batch: Any, size: int, axis: int) -> Any:
    """The batch with its sequences moved on by one; None where it has one sequence alone."""
    if size < 2:
        return None
    if isinstance(batch, torch.Tensor):
        return batch.roll(1, axis) if batch.ndim > axis and batch.shape[axis] == size else batch
    if isinstance(batch, Mapping):
        return {name: rearranged_batch(value, size, axis) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(rearranged_batch(value, size, axis) for value in batch)
    return batch


def user_head(
    given: Callable[[torch.Tensor], torch.Tensor], model: ModelUnderTest, pick: Pick | None
) -> Head:
    """A head of the user's, proven like one that was found; it gets (B, T, D), or (B, T, N, D) of several streams."""

    def head(state: torch.Tensor) -> torch.Tensor:
        return by_token(given(state.squeeze(2) if state.shape[2] == 1 else state), model.structure.batch_axis)

    require_head(head, model, pick)
    return head
