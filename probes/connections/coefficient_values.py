"""Which values of a recorded forward are the coefficients of the connections? What multiplies the streams leads to them.

What multiplies the streams on their way from a state to the next, or what a branch gives, is followed in the graph back to the
states and parameters; which of these values is which coefficient, and in which orientation, its numbers say. What was not held
is run again. Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from depthscope.probes.connections.proof import SAME, Parts, per_token
from depthscope.probes.reading.description import ConnectionReading, DepthReading, MemoryReading
from depthscope.probes.reading.graph import PARAMETER, Graph, ReadingError, TracedValue, names, walk
from depthscope.probes.reading.operations import addends, reordered

AnyConnection = ConnectionReading | DepthReading
MOST_VIEWS = 2  # branch inputs of a matrix that reads and mixes: more are rare


def vector(weights: torch.Tensor | None) -> torch.Tensor | None:
    """Weights (K, T, n) of a connection with one view."""
    if weights is None or 1 not in weights.shape[-2:]:
        return None
    return weights.flatten(-2)


def reads_of(connection: AnyConnection) -> list[TracedValue]:
    """What the branches of a connection take."""
    return [value for of in connection.branches for value in of.branch.inputs if value.func is not None]


def factors_of(graph: Graph, memory: MemoryReading, connection: AnyConnection) -> Iterator[TracedValue]:
    """What multiplies the streams between two states or on the way to what a branch reads, or what a branch gives."""
    values, carried = graph.values, memory.carried
    before = memory.states[connection.depth_in].values
    begin = {of.number for of in reordered(graph, (values[n] for n in before))}

    def between(found: Iterable[TracedValue]) -> list[TracedValue]:
        return [
            of for of in found if of.number in carried and of.number > min(begin) and of.number not in begin
        ]

    ends = [*(values[n] for n in memory.states[connection.depth_out].values), *reads_of(connection)]
    steps = [
        of for of in walk(between(ends), lambda of: between(of.parents))
        if any(p.number in carried for p in of.parents)
    ]  # fmt: skip
    ways = [of.branch.way for of in connection.branches]
    for step in (*steps, *(values[n] for way in ways for n in way[1:])):
        given = {of.number for of in addends(step)}.union(*ways)
        yield from (
            p for p in step.parents if p.is_floating and p.number not in given and p.number not in carried
        )


def _distinguishable(states: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """The values of each state together with those of all states that it shares some with, which may be any of them."""
    groups: list[frozenset[int]] = []
    for own in states:
        shared = [group for group in groups if group & own]
        groups = [group for group in groups if group not in shared] + [own.union(*shared)]
    return [next((group for group in groups if group & own), own) for own in states]


@dataclass
class CoefficientValues:
    """The coefficients of all connections among the values of one forward, whose tensors are held.

    ``memory, connections``: what was read in it, of all connections in order.
    ``batch_size, tokens``: B and T.
    ``precision``: in which the model multiplies its states: weights that were read by running operations once more
    are rounded to it.
    ``norms``: ``norms(tensors, values)`` are the norms (B, T) of what has the elements of some values of the memory.
    """

    graph: Graph  # of its operations
    memory: MemoryReading
    connections: Sequence[ConnectionReading]
    parts: Sequence[Parts]  # their coefficients in the sampled sequences (K, T, …), on the CPU
    batch_size: int
    tokens: int
    rows: list[int]  # the sequences of this batch that were sampled
    precision: torch.dtype
    norms: Callable[[Sequence[torch.Tensor], Sequence[TracedValue]], torch.Tensor]

    def __post_init__(self) -> None:
        self.rerun = Rerun(self.graph)
        # Views of parameters say so without gradients, too.
        self.states = [self.state(of.depth_in) for of in self.connections]
        self.numbers = _distinguishable([frozenset(value.number for value in found) for found in self.states])
        self.every = frozenset[int]().union(*self.numbers)
        self.weights = [_weights(parts) for parts in self.parts]
        self.factors = [
            list(dict.fromkeys(factors_of(self.graph, self.memory, each))) for each in self.connections
        ]
        numbers = [[of.number for of in factors] for factors in self.factors]
        # What these were computed from, and they.
        self.behind_factors = [
            [self.graph.values[n] for n in sorted(self.graph.ancestors(of, stop=self.every))]
            for of in numbers
        ]
        self.found = [self._values_of_weights(number) for number in range(len(numbers))]

    def state(self, depth: int) -> list[TracedValue]:
        """The values that are a state, in this order of its elements or another one, the earliest first."""
        values = (self.graph.values[number] for number in self.memory.states[depth].values)
        return sorted(reordered(self.graph, values), key=lambda value: value.number)

    def first_of(self, depth: int) -> list[TracedValue]:
        """For each value of a state, the earliest that has the same elements."""
        same = (reordered(self.graph, [self.graph.values[n]]) for n in self.memory.states[depth].values)
        carried = ([value for value in of if value.number in self.memory.carried] for of in same)
        return list(dict.fromkeys(min(of, key=lambda value: value.number) for of in carried))

    def _values_of_weights(self, number: int) -> dict[str, list[TracedValue]]:
        found = {name: self._matching(number, wanted) for name, wanted in self.weights[number].items()}
        self.rerun.forget(self.numbers[number])
        return found

    def branch_inputs(self, number: int) -> set[int]:
        """The values that are what a connection's branches take."""
        taken = reordered(self.graph, reads_of(self.connections[number]))
        return {value.number for value in taken} - self.every

    def window(self, number: int) -> tuple[int, int]:
        """The part of the forward from the first value that is this connection's state to the one that is the next state."""
        after = self.state(self.connections[number].depth_out)
        return self.states[number][0].number, after[0].number

    def behind(self, values: Sequence[TracedValue]) -> set[int]:
        """What some values were computed from, back to the states of the connections."""
        return self.graph.ancestors([value.number for value in values], stop=self.every)

    def squares(self, number: int) -> list[TracedValue]:
        """What a connection's factors were computed from and has the size of its matrix, in order."""
        n = self.weights[number]["H_res"].shape[-1]
        sizes = self.sizes(n * n)
        return [value for value in self.behind_factors[number] if value.numel in sizes and value.is_floating]

    def parameters_in(self, numbers: set[int]) -> list[TracedValue]:
        """The parameters among some values."""
        return [self.graph.values[n] for n in sorted(numbers) if self.graph.values[n].kind == PARAMETER]

    def sizes(self, *of_token: int) -> set[int]:
        """How many numbers a tensor has with so many for each token, or for all of them together."""
        lead = self.batch_size * self.tokens
        return {count for size in of_token for count in (size, lead * size)}

    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value of the forward."""
        return self.rerun.tensor(value)

    def per_token(self, value: TracedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A value as (B, T, *tail) in the ways that its shape allows; none where its tensor cannot be had."""
        try:
            tensor = self.tensor(value)
        except ReadingError:
            return
        yield from per_token(tensor, tail, self.batch_size, self.tokens)

    def sampled(self, value: TracedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A value as (K, T, *tail) of the sampled sequences, in the ways that its shape allows."""
        for each in self.per_token(value, tail):
            yield each[self.rows].to("cpu", torch.float32)

    def _matching(self, number: int, wanted: torch.Tensor) -> list[TracedValue]:
        """The values among what the factors were computed from that are some coefficients (K, T, *tail), or their transpose.

        A matrix may be a part of one that reads too: its last columns, source by destination.
        """
        limit = SAME * max(1.0, float(wanted.abs().max()))
        tail = tuple(wanted.shape[2:])
        more = [tail[0] * (tail[0] + views) for views in range(1, MOST_VIEWS + 1)] if len(tail) == 2 else []
        sizes, first = self.sizes(math.prod(tail), *more), wanted[0, 0].flatten().tolist()
        return [
            value
            for value in self.behind_factors[number]
            if value.numel in sizes
            and value.is_floating
            and any(self.equal(each, wanted, first, limit) for each in self._readings(value, tail))
        ]

    def _readings(self, value: TracedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        matrix = len(tail) == 2
        for each in self.per_token(value, tail):
            yield from (each, each.mT) if matrix else (each,)
        for views in range(1, MOST_VIEWS + 1) if matrix else ():
            for each in self.per_token(value, (tail[0], tail[0] + views)):
                yield from (each[..., views:], each[..., views:].mT)

    def equal(self, tensor: torch.Tensor, wanted: torch.Tensor, first: Sequence[float], limit: float) -> bool:
        """Whether weights (B, T, …) of all sequences are these (K, T, …) of the sampled ones, whose first token is given."""
        # One token first, as plain numbers: most candidates differ everywhere.
        rounding, rows = torch.finfo(self.precision).eps, self.rows
        for one, other in zip(tensor[rows[0], 0].flatten().tolist(), first, strict=True):
            if abs(one - other) > 2 * limit + rounding * abs(one):
                return False
        few = tensor[rows].to(wanted.device, torch.float32)
        rounded = torch.equal(few.to(self.precision).float(), wanted)
        return rounded or bool((few - wanted).abs().max() <= limit)

    def gradients(
        self,
        ends: Sequence[TracedValue],
        begins: Sequence[TracedValue],
        part: Callable[[TracedValue, torch.Tensor], torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """The gradients of a random combination of parts of some values at earlier ones; empty where these have none."""
        ends = [of for of in ends if any(self.graph.depends(of, begin) for begin in begins)]
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.enable_grad():
                leaves = {of.number: self.tensor(of).detach().clone().requires_grad_() for of in begins}
                made = self.rerun.through(ends, leaves) if ends else {}
                parts = [part(of, made[of.number]) for of in ends]
                terms = [
                    (of.float().cpu() * torch.randn(of.shape, generator=generator)).sum()
                    for of in parts
                    if of is not None and of.requires_grad
                ]
                if not terms:
                    return []
                found = torch.autograd.grad(
                    torch.stack(terms).sum(), list(leaves.values()), allow_unused=True
                )
        except (ReadingError, RuntimeError):  # an operation without a derivative, or one that was not kept
            return []
        pairs = zip(found, leaves.values(), strict=True)
        return [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]


def _weights(parts: Parts) -> dict[str, torch.Tensor]:
    """The coefficients of a connection by their names: H_res (K, T, n, n), H_pre and H_post (K, T, n) of one view."""
    n = parts.write.shape[-2]
    mix = torch.eye(n).expand(*parts.write.shape[:-1], n) if parts.mix is None else parts.mix
    found = {"H_res": mix, "H_pre": vector(parts.read), "H_post": vector(parts.write)}
    return {name: of for name, of in found.items() if of is not None}


# What gives other numbers each time.
RANDOM = names(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli normal uniform multinomial exponential"
)


class Rerun:
    """The tensors of a forward's values, as long as its graph holds those from which they are made."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._made: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value.

        Raises ReadingError: Where it comes from what was not held and cannot be run again.
        """

        def made_of(of: TracedValue) -> Sequence[TracedValue]:
            return () if of.number in self._made or of.held is not None else of.parents

        for of in sorted(walk([value], made_of), key=lambda of: of.number):
            if of.number not in self._made:
                self._made[of.number] = self._run(of) if of.held is None else of.held.detach()
        return self._made[value.number]

    def through(
        self, targets: Sequence[TracedValue], begins: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Values that were computed from earlier ones, run again from other tensors for these, with the graph of these."""
        made, first = dict(begins), min(begins)
        between = walk(
            targets, lambda of: (p for p in of.parents if p.number > first and p.number not in begins)
        )
        for of in sorted(between, key=lambda of: of.number):
            if of.number not in made and any(p.number in made for p in of.parents):
                made[of.number] = self._run(of, made)
        return {of.number: made[of.number] for of in targets}

    def forget(self, but: Collection[int] = ()) -> None:
        """Let go of what was made, but for the values with some numbers, from which later ones are made."""
        self._made = {number: self._made[number] for number in but if number in self._made}

    def _run(self, value: TracedValue, given: Mapping[int, torch.Tensor] | None = None) -> torch.Tensor:
        if value.func is None or value.name in RANDOM:
            raise ReadingError(f"the value of {value!r} was not kept")
        known = given or {}
        return Graph.run(value, lambda of: known[of.number] if of.number in known else self.tensor(of))
