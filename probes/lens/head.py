"""What turns the last state into the output? The model's own operations after it, recorded once and proven on other data.

No norm or unembedding is looked for by name. Every operation that depends on the last state is recorded; run again on that
state it must give the output, and on the last state of *other* sequences the output of those: so nothing else of the forward
(an earlier depth, the ids) is read on the way. Merging of streams, final norm, unembedding, scaling and soft caps are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch

from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.predictions import Pick, by_token, named_logits
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.recorder import GraphRecorder

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""``head(state)``: logits (B, T, V) from a state (B, T, N, D)."""

# Of the logits run again: the same operations in the same precision on the same shapes; a heuristic of ours.
HEAD_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HINT = (
    "pass head=lambda state: …, the final norm and the unembedding of the model, which gets a state (B, T, D)"
)


class HeadError(InterventionError):
    """A head that cannot be found, or that does not give the model's output."""


class HeadRecording:
    """The operations of a recorded forward from the last state on."""

    def __init__(self, model: ModelUnderTest) -> None:
        self.recorder = GraphRecorder(model.model, list(tensors_in(model.batch)))
        self.state: torch.Tensor | None = None
        self._roots: list[TracedValue] = []

    def start(self, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        """Hold what operations take from now on; what they make of the tensors that hold this state is run again."""
        self._roots = [self.recorder.known(tensor) for tensor in own]
        self.state = state.detach().clone()  # it may be written in place
        self.recorder.on_taken = self.recorder.hold

    def steps_to(self, target: torch.Tensor) -> list[TracedValue]:
        """The operations that made a tensor of the state, in order; none where none did."""
        graph, end, roots = self.recorder.graph, self.recorder.known(target), self._roots
        if graph.error is not None:
            return []
        held = {root.number for root in roots}
        behind = [graph.values[number] for number in sorted(graph.ancestors([end.number], stop=held) - held)]
        return [value for value in behind if any(graph.depends(value, root) for root in roots)]

    def replay(self, steps: Sequence[TracedValue], state: torch.Tensor) -> torch.Tensor:
        """What the last step would have made of another state, in the model's own layout; with a graph where that has one."""
        parts = list(state) if len(self._roots) > 1 else [state]
        graph, values = (
            self.recorder.graph,
            {root.number: part for root, part in zip(self._roots, parts, strict=True)},
        )

        def given(of: TracedValue) -> torch.Tensor:
            return values[of.number] if of.number in values else graph.tensor(of)

        for value in steps:
            values[value.number] = graph.run(value, given)
        return values[steps[-1].number]


def find_head(model: ModelUnderTest, pick: Pick | None = None) -> Head:
    """The operations from the last state of the chain to the logits.

    Returns: For states of this batch's shape; differentiable.
    Raises HeadError: Where the output does not depend on the last state alone.
    """
    recording, last = HeadRecording(model), len(model.chain.points) - 1

    def shown(depth: int, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        if depth == last:
            recording.start(state, own)

    steps = recording.steps_to(_logits(model.observed(recording.recorder, shown), pick))
    like = recording.state
    if like is None or not steps:
        raise HeadError(f"the output was not seen to be computed from the last state of the chain; {HINT}")

    def head(state: torch.Tensor) -> torch.Tensor:
        # The graph, where there is one, goes through the rearrangement.
        return by_token(recording.replay(steps, model.native(state, like, last)), model.structure.batch_axis)

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

    def shown(depth: int, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        if depth == last:
            seen[depth] = model.canonical(state, depth).clone()

    output = model.observed(nullcontext(), shown, other)
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
