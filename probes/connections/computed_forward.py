"""What did one forward compute? Its recorded graph, and the small tensors and states of it with their gradients' graph.

One forward of the model is recorded: what was computed from what. Of some numbers of elements the tensors are held, as they
are taken by the next operation, when autograd knows them. Shapes: B batch, T token, N stream, D feature; K the sampled
sequences.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from depthscope.probes.connections.coefficients import per_token, spread
from depthscope.probes.connections.computed_values import ComputedValue, ComputedValues
from depthscope.probes.connections.logits import SAME
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.operations import MATRICES, MOVES
from depthscope.probes.reading.recorder import GraphRecorder

COMPARED = 64  # numbers of a state by which it is recognised; a heuristic
MOST_VIEWS = 2  # branch inputs of a matrix that reads and mixes: more are rare


def values_of_connections(recorder: GraphRecorder, num_streams: int, width: int, lead: int) -> ComputedValues:
    """The values of a forward that is about to be recorded that may be coefficients, states or inputs of branches.

    ``num_streams, width, lead``: n, D and the number of tokens of the batch.
    """
    n = num_streams
    of_token = [n, n * n, *(n * (n + views) for views in range(1, MOST_VIEWS + 1))]
    sizes = {*of_token, *(lead * size for size in (*of_token, width, n * width))}
    found = ComputedValues(recorder.graph, lambda shape: math.prod(shape) in sizes)

    def note_matrix(value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a matrix that nothing may take: a copy, since autograd would make another tensor of a view that is held."""
        square = tensor.numel() in (n * n, lead * n * n) and value.shape[-2:] == (n, n)
        # What autograd keeps for the backward is another detached tensor of one that is there.
        if square and value.name not in ("detach", "alias"):
            found.take(value, tensor.detach().clone())

    recorder.on_taken, recorder.on_value = found.take, note_matrix
    return found


@dataclass
class ComputedForward:
    """What one forward computed.

    ``graph``: of its operations.
    ``values``: in order.
    ``parameters``: the model's parameters, by their numbers in the graph.
    ``outputs``: what the model returned.
    ``batch_size, tokens``: B and T.
    ``canonical``: a state of the model's own layout as (B, T, N, D).
    ``shape``: of a state in the model's own layout.
    ``rows``: the sequences of this batch that were sampled.
    ``precision``: in which the model multiplies its states: weights that were read by running operations once more
    are rounded to it.
    ``autocast``: whether torch's autocast multiplied the states.
    ``loss``: with its graph, where gradients are wanted.
    """

    graph: Graph
    values: Sequence[ComputedValue]
    parameters: Mapping[int, torch.Tensor]
    outputs: list[torch.Tensor]
    batch_size: int
    tokens: int
    canonical: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    rows: list[int]
    precision: torch.dtype = torch.float32
    autocast: bool = False
    loss: torch.Tensor | None = None
    _states: list[tuple[ComputedValue, torch.Tensor]] = field(init=False)
    # By identity, with the weights themselves, so that no others get it.
    _firsts: dict[int, tuple[list[float], torch.Tensor]] = field(init=False, default_factory=dict)
    _sized: dict[tuple[int, ...], list[ComputedValue]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        current = [value for value in self.values if value.value.shape == self.shape]
        self._states = [(v, self._few(self.canonical(v.tensor.detach())[self.rows])) for v in current]

    def is_used(self, value: ComputedValue) -> bool:
        """Whether the outputs were computed from a value, by whatever operations."""
        return self.graph.reaches_output(value.value)

    def is_only_multiplied(self, value: TracedValue) -> bool:
        """Whether a matrix is only multiplied: where it is rounded, autocast may have done so."""
        return all(
            taker.name in MATRICES or (taker.name in MOVES and self.is_only_multiplied(taker))
            for taker in self.graph.takers(value)
        )

    @staticmethod
    def _few(state: torch.Tensor) -> torch.Tensor:
        flat = state.flatten()
        return flat[spread(len(flat), COMPARED).to(flat.device)].double().cpu()

    def states(self, x: torch.Tensor) -> list[ComputedValue]:
        """Every value that is this state, (K, T, N, D) of the sampled sequences; those with the very same numbers, if any."""
        wanted = self._few(x)
        limit = SAME * wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        apart = [
            (value, float((few - wanted).abs().max()))
            for value, few in self._states
            if len(few) == len(wanted)
        ]
        # After an explosion the next states differ by less than a rounding of the largest number.
        return [value for value, gap in apart if gap == 0] or [value for value, gap in apart if gap <= limit]

    def per_token(self, tensor: torch.Tensor, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A tensor as (B, T, *tail) in the ways that its shape allows; a constant one is expanded."""
        return per_token(tensor, tail, self.batch_size, self.tokens)

    def matching(self, wanted: torch.Tensor, between: tuple[int, int]) -> list[ComputedValue]:
        """The values that are these coefficients (K, T, *tail), or their transpose, in order.

        A matrix may be a part of one that reads too: its last columns, source by destination.

        ``wanted``: coefficients of the sampled sequences, on the CPU.
        ``between``: the values of which part of the forward are looked at, by their numbers.
        """
        limit = SAME * max(1.0, float(wanted.abs().max()))
        tail = tuple(wanted.shape[2:])
        more = [tail[0] * (tail[0] + views) for views in range(1, MOST_VIEWS + 1)] if len(tail) == 2 else []
        return [
            value
            for value in self.sized((math.prod(tail), *more), between)
            if any(self.equal(each, wanted, limit) for each in self._readings(value, tail))
        ]

    def sized(self, sizes: Sequence[int], between: tuple[int, int]) -> Sequence[ComputedValue]:
        """The values of a part of the forward that have so many numbers a token, or for all tokens together."""
        key = tuple(sizes)
        if key not in self._sized:
            lead = self.batch_size * self.tokens
            known = {count for size in sizes for count in (size, lead * size)}
            self._sized[key] = [value for value in self.values if value.tensor.numel() in known]
        return _part(self._sized[key], between)

    def within(self, between: tuple[int, int]) -> Sequence[ComputedValue]:
        """The values of a part of the forward that are what they were."""
        return _part(self.values, between)

    def _readings(self, value: ComputedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        tensor, matrix = value.tensor.detach(), len(tail) == 2
        for each in self.per_token(tensor, tail):
            yield from (each, each.mT) if matrix else (each,)
        for views in range(1, MOST_VIEWS + 1) if matrix else ():
            for each in self.per_token(tensor, (tail[0], tail[0] + views)):
                yield from (each[..., views:], each[..., views:].mT)

    def equal(self, tensor: torch.Tensor, wanted: torch.Tensor, limit: float) -> bool:
        """Whether weights (B, T, …) of all sequences are these (K, T, …) of the sampled ones."""
        if tensor.is_meta:  # weights that are elsewhere between two uses
            return False
        # One token first, as plain numbers and before the sampled sequences are gathered: most candidates differ everywhere.
        rounding = torch.finfo(self.precision).eps
        for one, other in zip(tensor[self.rows[0], 0].flatten().tolist(), self._first(wanted), strict=True):
            if abs(one - other) > 2 * limit + rounding * abs(one):
                return False
        few = tensor[self.rows].to(wanted.device, torch.float32)
        for tokens in (slice(1), slice(None)):
            one, other = few[:, tokens], wanted[:, tokens]
            rounded = torch.equal(one.to(self.precision).float(), other)
            if not rounded and (one - other).abs().max() > limit:
                return False
        return True

    def _first(self, wanted: torch.Tensor) -> list[float]:
        """The weights of the first token, as numbers."""
        known = self._firsts.get(id(wanted))
        if known is None:
            known = self._firsts[id(wanted)] = wanted[0, 0].flatten().tolist(), wanted
        return known[0]

    def gradients(self, tensors: Sequence[torch.Tensor]) -> list[float | None]:
        """The largest gradients of a random combination of the outputs; None where autograd has no path to a tensor."""
        generator = torch.Generator().manual_seed(0)
        carrying = [output for output in self.outputs if output.requires_grad]
        wanted = [position for position, tensor in enumerate(tensors) if tensor.requires_grad]
        found: list[float | None] = [None] * len(tensors)
        if not carrying or not wanted:
            return found
        total = torch.stack(
            [
                (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
                for output in carrying
            ]
        ).sum()
        gradients = torch.autograd.grad(
            total, [tensors[i] for i in wanted], retain_graph=True, allow_unused=True
        )
        for position, gradient in zip(wanted, gradients, strict=True):
            found[position] = None if gradient is None else float(gradient.abs().max())
        return found


def _part(values: Sequence[ComputedValue], between: tuple[int, int]) -> Sequence[ComputedValue]:
    """Those of some values in order that have numbers in a range."""
    first, last = (bisect_left(values, number, key=lambda value: value.number) for number in between)
    return values[first:last]
