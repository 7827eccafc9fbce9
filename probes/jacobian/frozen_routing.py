"""How are the coefficients of stream connections held constant in a forward? No gradient passes through them.

    X' = H_res X + H_post ⊗ F(H_pre · X)

keeps its value, but its derivative is that of X and F only: Jᵀu = H_resᵀ u + H_preᵀ F'ᵀ (H_post · u). The forward is recorded;
whatever multiplies the streams, or what a branch gives, in the operations of the reading is a coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from depthscope.probes.connections.coefficients import StreamConnectionError
from depthscope.probes.model.tensors import tensors_in, version
from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.coefficients import coefficients, memory_of
from depthscope.probes.reading.connections import ConnectionParts, Linear
from depthscope.probes.reading.graph import ReadingError, TracedValue
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.reading.states import States
from depthscope.probes.session.session import Session

INSTEAD = "take routing='full', or capture() the model, which reports whether its connections can be proven"


@dataclass(frozen=True)
class FrozenConnection:
    """One connection whose coefficients are constant.

    ``depth_in, depth_out``: the states that it joins.
    ``parts``: its coefficients.
    ``reads``: what its branches take of the streams: with its graph, as a value of the memory, and by which weights;
    empty where that is carried on as well.
    """

    depth_in: int
    depth_out: int
    parts: ConnectionParts
    reads: list[tuple[torch.Tensor, TracedValue, torch.Tensor]]


class FrozenRouting:
    """The connections between the states of one recorded forward, whose coefficients no gradient passes.

    ``session``: one that has found the model's chains.
    ``batch``: what the model is about to be called with.
    """

    def __init__(self, session: Session, batch: Any):
        structure = session.structure
        if structure.num_streams > 1 and not structure.connections:
            raise StreamConnectionError(
                f"routing='frozen' needs the stream connections, but none was found for {structure.num_streams} streams; "
                "take routing='full'"
            )
        # The precision that the states are multiplied in: autocast's, where it is on, and not the dtype of the streams.
        self.precision = session.observer.precision
        self.recorder = GraphRecorder(session.model, list(tensors_in(batch)))
        self.recorder.on_taken = self._take
        self._paths = [link.path for link in structure.connections]
        self._taken: dict[int, tuple[torch.Tensor, int | None]] = {}
        self._values: dict[int, dict[int, TracedValue]] = {}  # by depth and stream

    def _take(self, value: TracedValue, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            self._taken[value.number] = tensor, version(tensor)

    def shown(self, depth: int, stream: int, state: torch.Tensor) -> None:
        """Note a tensor of the state at a depth, as the model hands it on."""
        self._values.setdefault(depth, {})[stream] = self.recorder.known(state)

    def _cut(self, depth: int) -> list[TracedValue]:
        """The values that are a state."""
        return [value for _, value in sorted(self._values[depth].items())]

    @torch.no_grad()
    def freeze(self, depths: Sequence[int]) -> None:
        """Hold the coefficients between some states constant in the graph of the forward that has ended.

        Raises StreamConnectionError: Where they cannot be read.
        """
        graph = self.recorder.graph
        try:
            if graph.error is not None:
                raise ReadingError(str(graph.error))
            memory = memory_of(graph, [value for depth in depths for value in self._cut(depth)])
            self._linear = Linear(States(memory, branches_of(memory)))
            found = coefficients(memory)
            self.connections = [self._connection(memory, *pair) for pair in pairwise(depths)]
        except ReadingError as error:
            raise StreamConnectionError(
                f"routing='frozen': the coefficients of the connections could not be read: {error}; {INSTEAD}"
            ) from error
        for value in found:
            tensor = self._tensor(value)
            if tensor is not None:
                tensor.register_hook(torch.zeros_like)

    def _tensor(self, value: TracedValue) -> torch.Tensor | None:
        """The tensor of a value with its graph; None where there is none, or where its memory was written since."""
        tensor, written = self._taken.get(value.number, (None, None))
        return None if tensor is None or version(tensor) != written else tensor

    def _connection(self, memory: Memory, depth_in: int, depth_out: int) -> FrozenConnection:
        before, after = self._cut(depth_in), self._cut(depth_out)
        parts = self._linear.joined_by(before, after, branches_of(memory))
        reads = [(value, weights) for branch in parts.branches for value, weights in branch.reads]
        known = [(t, v, weights) for v, weights in reads if (t := self._tensor(v)) is not None]
        # A branch input that is carried on, to the next state or to another one as inside of AltUp, is no way of its own.
        ends = [*after, *(value for value, _ in reads)]
        carried = {number for end in ends for number in memory.back([end]) - {end.number}}
        apart = len(known) == len(reads) and not any(value.number in carried for value, _ in reads)
        return FrozenConnection(depth_in, depth_out, parts, known if apart else [])

    def array(self, depth: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the order of the state at a depth, as (tokens, streams, features)."""
        cut = self._cut(depth)
        return self._sorted(cut, tensor.unbind() if len(cut) > 1 else [tensor])

    def as_read(self, value: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the order of what a branch takes, as (tokens, streams, features)."""
        return self._sorted([value], [tensor])

    def _sorted(self, cut: Sequence[TracedValue], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        states, parts = self._linear.states, [tensor[None] for tensor in tensors]
        return states.sorted(parts, [states.numbers(value) for value in cut], states.num_features)[0]

    def like_state(self, depth: int, array: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The tensor in the order of the state at a depth whose array this is."""
        numbers = self.array(depth, torch.arange(like.numel(), dtype=torch.float64).reshape(like.shape))
        flat = torch.empty(like.numel(), dtype=array.dtype, device=array.device)
        flat[numbers.long().flatten().to(array.device)] = array.flatten()
        return flat.reshape(like.shape).to(like)

    def name(self, number: int) -> str:
        """A connection between two depths, as it is called in an error."""
        path = self._paths[number] if number < len(self._paths) else ""
        return f"connection {number} ({path!r})"
