"""What is recorded of one call of the model, with its sampled sequences, and which call a thread is running."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from depthscope.probes.connections.proof import Weights
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Hook, Report, in_recomputation
from depthscope.probes.model.user_modes import in_transformation
from depthscope.probes.reading.graph import walk
from depthscope.probes.reading.places import PlacedRecorder
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.statistics.token_sums import TokenSums, merge_sums


class GradientListener:
    """Hands on the gradient of what a tensor held, in every backward that goes on below it, by ``receive(gradient)``.

    It listens at the ``end`` where the graph of the tensor begins: a hook on a tensor stays at what the tensor held when its
    first hook came, also where it is written in place later, and so would every later hook of the user's.
    """

    def __init__(self, end: GradientEdge, receive: Callable[[torch.Tensor | None], None], report: Report):
        self.end: GradientEdge | None = end
        self._receive: Callable[[torch.Tensor | None], None] | None = receive
        self.num_received = 0
        self.handle: RemovableHandle
        if end.node.name() == "torch::autograd::AccumulateGrad":  # of a tensor that no operation made
            self.handle = end.node.variable.register_hook(Hook(self.receive, report))
        else:
            number = end.output_nr
            at_node = Hook(lambda gradients: self.receive(gradients[number]), report)
            self.handle = end.node.register_prehook(at_node)

    def release(self) -> None:
        """Listen no more, and let go of the graph and of the receiver, which knows the forward."""
        self.handle.remove()
        self.end = self._receive = None

    def receive(self, gradient: torch.Tensor | None) -> None:
        """Hand a gradient on."""
        self.num_received += 1
        if self._receive is not None:
            self._receive(gradient)


def backward_to(forward: Forward, ends: list[TensorKey], outputs: list[torch.Tensor], **options: Any) -> None:
    """Run a backward that ends at some states: no parameter's ``.grad`` is written, no hook of the user's on it runs."""
    listeners = [forward.expected_gradients[key] for key in ends]
    before = [listener.num_received for listener in listeners]
    # allow_unused: the loss may not depend on a chain, such as that of a frozen encoder.
    edges = [listener.end for listener in listeners if listener.end is not None]
    try:
        found = torch.autograd.grad(outputs, edges, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise CaptureError(
            "the model computes blocks again in its backward, by torch.utils.checkpoint with use_reentrant=True, which can "
            "end at no state; call checkpoint with use_reentrant=False, or capture without gradients"
        ) from error
    for listener, times, gradient in zip(listeners, before, found, strict=True):
        if listener.num_received == times:  # nothing below its node was run
            listener.receive(gradient)


Key: TypeAlias = tuple[int, int]  # the number of a chain, and a depth (or `FINAL`) or a connection of it
TensorKey: TypeAlias = tuple[int, int, int]  # a chain, a depth, and a stream where each is its own tensor


Stamp: TypeAlias = tuple[int, bool]
"""Which weights, see `weights_stamp`, and whether in training: its sums and samples do not mix with those of evaluations."""


@dataclass
class Sequence:
    """One stored sequence; tensors on the CPU, first axis the token."""

    index: int
    mask: dict[int, torch.Tensor]
    states: dict[tuple[int, int], torch.Tensor]
    gradients: dict[tuple[int, int], torch.Tensor]
    carried: frozenset[tuple[int, int]]  # states with a graph, whether or not their gradient arrived
    parts: dict[tuple[int, int], Weights]
    branches: dict[tuple[int, int], torch.Tensor]
    row: torch.Tensor | None  # of the model's first tensor, for the digest of the data
    attention: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (3, H, T) before a state


@dataclass(eq=False)
class Forward:
    """What was recorded of one call of the model."""

    batch_size: int
    stamp: Stamp
    first_index: int  # of its sequences, over all forwards
    slots: dict[int, int]  # row of the batch to slot of the reservoir
    arguments: Mapping[str, Any]
    rows: torch.Tensor  # the sampled sequences
    row_data: torch.Tensor | None  # the sampled sequences of that tensor
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)
    states: dict[Key, torch.Tensor] = field(default_factory=dict)
    gradients: dict[Key, torch.Tensor] = field(default_factory=dict)
    # Of states that lack others: the model's own tensor and a copy.
    streams: dict[Key, dict[int, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    stream_gradients: dict[Key, dict[int, torch.Tensor]] = field(default_factory=dict)  # likewise
    expected_gradients: dict[TensorKey, GradientListener] = field(default_factory=dict)
    arrivals: Counter[Key] = field(default_factory=Counter)  # of gradients
    # Where the graphs of values begin that may be states, by their numbers.
    ends: dict[int, GradientEdge] = field(default_factory=dict)
    parts: dict[Key, Weights] = field(default_factory=dict)
    branches: dict[Key, torch.Tensor] = field(default_factory=dict)
    # What the queries of the first of the sampled sequences attend to before a state, (3, S, H, T).
    attention: dict[Key, torch.Tensor] = field(default_factory=dict)
    fired: set[tuple[str, int, int]] = field(default_factory=set)
    sums: list[TokenSums] = field(default_factory=list)
    call_counts: dict[tuple[str, str], int] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)  # of other gradient hooks
    order: dict[int, list[int]] = field(default_factory=dict)  # of the depths of each chain, as they passed
    # Where its operations are recorded, from the beginning of the model's own call on.
    recorder: GraphRecorder | PlacedRecorder | None = None
    has_begun: bool = False  # the model's own forward, around which the recorder is on
    met: set[int] = field(default_factory=set)  # numbers of the values that an operation took
    nested: int = 0  # calls of the model that are running inside of this one
    ending: bool = False  # what only a forward that has ended shows is being recorded
    ended: bool = False
    transformed: bool = False  # modules ran inside of a transformation of torch.func
    gradients_undefined: bool = False  # several backwards went through it
    cancelled: bool = False  # its step ended, or its hooks left, before it did
    without_connections: str = ""  # why the connections were not read; empty where they were

    def next_index(self, kind: str, path: str) -> int:
        """Index of this call among the calls of one module in this forward; a block may run several times."""
        index = self.call_counts.get((kind, path), 0)
        self.call_counts[kind, path] = index + 1
        return index

    def end(self) -> None:
        """Drop what only the running forward needs: the user's batch must not live longer than the user keeps it."""
        self.ended = True
        self.ends.clear()
        self.arguments, self.recorder = {}, None
        self.streams.clear()

    def release(self) -> None:
        """Remove the gradient hooks, and let go of the graph."""
        self.end()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for listener in self.expected_gradients.values():
            listener.release()

    def cancel(self) -> None:
        """Forget what was recorded: it counts to no step."""
        self.cancelled = True
        self.release()

    def backward_ends(self) -> list[TensorKey]:
        """Where a backward of ours ends: at the first state of each chain; gradients of weights are the user's.

        And at those whose graph does not lead back to an earlier one. A block that detaches its input cuts the graph: a
        backward to the first state alone would then run nowhere.
        """
        ends: list[TensorKey] = []
        earlier: dict[int, tuple[int, set[Any]]] = {}  # first depth of each chain, and what made its states
        listeners = self.expected_gradients.items()
        for key, listener in sorted(listeners, key=lambda of: (of[0][0], of[0][1] < 0, of[0])):  # FINAL last
            assert listener.end is not None, "the forward was released"
            first, nodes = earlier.setdefault(key[0], (key[1], set()))
            if key[1] == first or not leads_to(listener.end.node, nodes):
                ends.append(key)
            nodes.add(listener.end.node)
        return ends

    def chain_sums(self, number: int) -> TokenSums:
        """The sums of one chain."""
        while len(self.sums) <= number:
            self.sums.append(TokenSums())
        return self.sums[number]

    def sampled(self, tensor: torch.Tensor) -> torch.Tensor:
        """A float32 copy of the sampled sequences of a tensor (B, …)."""
        return tensor[self.rows.to(tensor.device)].float()

    def sequences(self) -> list[tuple[int, Sequence]]:
        """The sampled sequences, on the CPU, with their slots."""
        found = []
        for position, row in enumerate(self.rows.tolist()):
            sequence = Sequence(
                index=self.first_index + row,
                mask={number: mask[row].cpu() for number, mask in self.masks.items() if mask is not None},
                states=_cloned_row(self.states, position),
                gradients=_cloned_row(self.gradients, position),
                carried=frozenset((number, depth) for number, depth, _ in self.expected_gradients),
                parts={key: parts.at(position).detached() for key, parts in self.parts.items()},
                branches=_cloned_row(self.branches, position),
                attention={
                    key: rows[:, position].cpu().clone()
                    for key, rows in self.attention.items()
                    if position < rows.shape[1]
                },
                row=None if self.row_data is None else self.row_data[position].cpu().clone(),
            )
            found.append((self.slots[row], sequence))
        return found


def padded(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """A sequence's tensor (T, …) with zeros appended up to a number of tokens."""
    missing = tokens - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def token_masks(sequences: list[Sequence], number: int, depth: int = 0) -> list[np.ndarray]:
    """One mask per sequence, all as long as the longest; false on padding."""
    lengths = [sequence.states[number, depth].shape[0] for sequence in sequences]
    masks = []
    for sequence, length in zip(sequences, lengths, strict=True):
        mask = sequence.mask.get(number)
        full = np.zeros(max(lengths), dtype=bool)
        full[:length] = True if mask is None else mask.numpy()
        masks.append(full)
    return masks


Edge: TypeAlias = tuple[Any, int]  # a node of a graph of autograd, and the number of its output


def edges_behind(start: Iterable[Edge], until: Collection[Edge] = ()) -> Iterator[Edge]:
    """The edges of a graph of autograd from some on; none behind those in ``until``."""

    def behind(edges: Iterable[Edge]) -> list[Edge]:
        return [edge for edge in edges if edge[0] is not None]

    return walk(behind(start), lambda edge: [] if edge in until else behind(edge[0].next_functions))


def leads_to(node: Any, wanted: set[Any]) -> bool:
    """Whether the graph below an operation has one of some others."""
    return any(of in wanted for of, _ in edges_behind(node.next_functions))


def _cloned_row(tensors: Mapping[Key, torch.Tensor], position: int) -> dict[Key, torch.Tensor]:
    # Cloned, since a view would keep the other sequences of its batch in memory; one alone is a copy already.
    rows = {key: (tensor[position].cpu(), len(tensor) > 1) for key, tensor in tensors.items()}
    return {key: row.clone() if shared else row for key, (row, shared) in rows.items()}


@dataclass
class Measured:
    """What forwards with the same weights add up to."""

    stamp: Stamp
    num_forwards: int = 0
    batch_size: int = 0
    sums: list[TokenSums] = field(default_factory=list)

    def add(self, forward: Forward) -> None:
        """Add one more forward."""
        self.num_forwards += 1
        self.batch_size += forward.batch_size
        self.sums = merge_sums(self.sums, forward.sums)


class CurrentForward(threading.local):
    """The forward that this thread is running.

    One model may run in several threads at once; the hooks, which all threads share, find the record of their own here.
    """

    forward: Forward | None = None

    def __init__(self, owner: object):
        self.owner = owner

    @property
    def foreign(self) -> bool:
        """Whether another probe runs the model for itself."""
        return own_calls.owner not in (None, self.owner)

    @property
    def recorded(self) -> Forward | None:
        """The forward that hooks write to; None outside of one, and where what runs is not it.

        Under activation checkpointing the backward runs blocks once more: their states were recorded already. Inside of
        torch.func tensors stand for others.
        """
        forward = self.forward
        if forward is None or forward.cancelled or self.foreign or in_recomputation() or in_transformation():
            return None
        return forward

    def clear(self) -> None:
        """Forget a forward that did not end."""
        if self.forward is not None:
            self.forward.cancel()
        self.forward = None


class _OwnCalls(threading.local):
    """For whom this thread calls the user's model at present; None for the user."""

    owner: object | None = None


own_calls = _OwnCalls()


@contextmanager
def own_call(owner: object) -> Iterator[None]:
    """Call the user's model for a measurement of ours: a recorder that is on at the same time must not count it."""
    before, own_calls.owner = own_calls.owner, owner
    try:
        yield
    finally:
        own_calls.owner = before
