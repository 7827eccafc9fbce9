"""From what were the coefficients of the connections computed, and what became of them? Read in one recorded forward.

What multiplies the streams on their way from a state to the next, or what a branch gives, is followed in the graph back to the
states and parameters; which of these values is which coefficient, and in which orientation, its numbers say. What was not held
is run again. Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from depthscope.probes.connections.proof import SAME, Origin, Parts, per_token
from depthscope.probes.reading.description import ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import INPUT, PARAMETER, Graph, ReadingError, TracedValue, names, walk
from depthscope.probes.reading.operations import addends, reordered

MOST_VIEWS = 2  # branch inputs of a matrix that reads and mixes: more are rare
# What gives other numbers each time.
RANDOM = names(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli normal uniform multinomial exponential"
)
UNIFORM = 1e-3  # of every entry from 1/n; a heuristic
CONSTANT = 1e-3  # of a factor, relative: some models add 1e-6 to their sigmoids; a heuristic
CASTS = (torch.bfloat16, torch.float16)  # eight-bit types need a scale, which is not tried


def reads_of(connection: ConnectionReading) -> list[TracedValue]:
    """What the branches of a connection take."""
    return [value for of in connection.branches for value in of.branch.inputs if value.func is not None]


def factors_of(graph: Graph, memory: MemoryReading, connection: ConnectionReading) -> Iterator[TracedValue]:
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
class Search:
    """What is known of the coefficients of all connections, by one forward with a graph, whose tensors are held."""

    graph: Graph  # of its operations
    memory: MemoryReading  # what was read in it
    connections: Sequence[ConnectionReading]  # all of them, in order
    parts: Sequence[Parts]  # their coefficients in the sampled sequences (K, T, …), on the CPU
    batch_size: int
    tokens: int
    rows: list[int]  # the sequences of this batch that were sampled
    # In which the model multiplies its states: weights that were read are rounded to it
    precision: torch.dtype
    # The norms (B, T) of tensors that have the elements of some values of the memory
    norms: Callable[[Sequence[torch.Tensor], Sequence[TracedValue]], torch.Tensor]

    def __post_init__(self) -> None:
        self._made: dict[int, torch.Tensor] = {}  # what was not held, run again
        # Views of parameters say so without gradients, too.
        self.states = [self.state(of.depth_in) for of in self.connections]
        self.numbers = _distinguishable([frozenset(value.number for value in found) for found in self.states])
        self.every = frozenset[int]().union(*self.numbers)
        self.weights = [parts.coefficients for parts in self.parts]
        self.factors = [
            list(dict.fromkeys(factors_of(self.graph, self.memory, each))) for each in self.connections
        ]
        numbers = [[of.number for of in factors] for factors in self.factors]
        # What these were computed from, and they.
        self.behind_factors = [
            [self.graph.values[n] for n in sorted(self.graph.ancestors(of, stop=self.every))]
            for of in numbers
        ]
        # The values that are each of its coefficients.
        self.found: list[dict[str, list[TracedValue]]] = []
        for number, own in enumerate(self.weights):
            self.found.append({name: self._matching(number, wanted) for name, wanted in own.items()})
            self.forget(self.numbers[number])

    def state(self, depth: int) -> list[TracedValue]:
        """The values that are a state, in this order of its elements or another one, the earliest first."""
        values = (self.graph.values[number] for number in self.memory.states[depth].values)
        return sorted(reordered(self.graph, values), key=lambda value: value.number)

    def first_of(self, depth: int) -> list[TracedValue]:
        """For each value of a state, the earliest that has the same elements."""
        same = (reordered(self.graph, [self.graph.values[n]]) for n in self.memory.states[depth].values)
        carried = ([value for value in of if value.number in self.memory.carried] for of in same)
        return list(dict.fromkeys(min(of, key=lambda value: value.number) for of in carried))

    def branch_inputs(self, number: int) -> set[int]:
        """The values that are what a connection's branches take."""
        taken = reordered(self.graph, reads_of(self.connections[number]))
        return {value.number for value in taken} - self.every

    def behind(self, values: Sequence[TracedValue]) -> set[int]:
        """What some values were computed from, back to the states of the connections."""
        return self.graph.ancestors([value.number for value in values], stop=self.every)

    def has_parameter(self, numbers: set[int]) -> bool:
        """Whether a parameter is among some values."""
        return any(self.graph.values[n].kind == PARAMETER for n in numbers)

    def sizes(self, *of_token: int) -> set[int]:
        """How many numbers a tensor has with so many for each token, or for all of them together."""
        lead = self.batch_size * self.tokens
        return {count for size in of_token for count in (size, lead * size)}

    @torch.no_grad()
    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value; ReadingError where it comes from what was not held and cannot be run again."""

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
        """The values behind the factors that are some coefficients, or their transpose, also as the last columns of one."""
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
                made = self.through(ends, leaves) if ends else {}
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

    def origin(self, number: int) -> Origin:
        """What is known of one connection."""
        found, mix = self.found[number], self.found[number].get("H_res", [])
        write = self.found[number].get("H_post", [])
        is_known = bool(mix and write) and write[-1].has_graph and not mix[-1].has_graph
        share, later = self._other_tokens(number)
        origin = Origin(
            other_states={
                name: at for name, values in found.items() if (at := self._other_states(number, values))
            },
            other_tokens=share,
            later=later,
            unused=self._unused_matrix(number),
            sigmoids=dict(self._sigmoids(number)),
            turned=self._is_transposed(number, mix),
            reads_along=self._reads_along(number, mix),
            gradients=self._gradients_of_uniform(number, mix),
            is_cut=is_known and self.has_parameter(self.behind(mix[:1])),
        )
        self.forget(self.numbers[number])
        return origin

    def _gradients_of_uniform(self, number: int, mix: Sequence[TracedValue]) -> tuple[float, float] | None:
        matrix, write = self.weights[number]["H_res"], self.found[number].get("H_post", [])
        behind, sizes = self.behind(mix), self.sizes(matrix.shape[-1] ** 2)
        squares = [of for of in self.behind_factors[number] if of.numel in sizes and of.is_floating]
        # The first that parameters made: the logits, or what a normalisation makes of them, which is uniform as well.
        logits = [of for of in squares if of.number in behind and self.has_parameter(self.behind([of]))][:1]
        if not logits or not write or float((matrix - 1 / matrix.shape[-1]).abs().max()) > UNIFORM:
            return None
        state = self.first_of(self.connections[number].depth_out)
        found = self.gradients(state, [*logits, write[-1]], lambda _, tensor: tensor)
        return (float(found[0].abs().max()), float(found[1].abs().max())) if found else None

    def _is_transposed(self, number: int, mix: Sequence[TracedValue]) -> bool | None:
        wanted = self.weights[number]["H_res"]
        n, first = wanted.shape[-1], wanted[0, 0].flatten().tolist()
        distance = float((wanted - wanted.mT).abs().max())
        # A matrix of two streams is nearly symmetric after Sinkhorn, and what it was before the last round nearly is its
        # transpose: as near as the square of what is left. Only the very same numbers tell which it is then, and in
        # half precision these are rounded to the same.
        nearly = distance <= UNIFORM
        if distance <= SAME or (nearly and self.precision in CASTS):
            return None
        limit = 0.0 if nearly else SAME
        for value in mix:
            for each in self.per_token(value, (n, n)):
                straight, turned = (self.equal(m, wanted, first, limit) for m in (each, each.mT))
                if straight or turned:
                    return None if straight and turned else turned
        return None

    def _reads_along(self, number: int, mix: Sequence[TracedValue]) -> bool | None:
        applied, read = self.weights[number]["H_res"], self.weights[number].get("H_pre")
        n = applied.shape[-1]
        for value in mix if read is not None else ():
            for few in self.sampled(value, (n, n + 1)):
                matrix, limit = few[..., 1:], SAME * max(1.0, float(few.abs().max()))
                # Each column, of the reads or of the mixing, is one result; its rows are the sources.
                straight, turned = (float((m - applied).abs().max()) <= limit for m in (matrix.mT, matrix))
                if float((few[..., 0] - read).abs().max()) <= limit and straight != turned:
                    return straight
        return None

    def _other_states(self, number: int, values: Sequence[TracedValue]) -> tuple[int, ...]:
        """The connections whose states some coefficients were computed from, other than by way of their own state."""
        start = [value for value in values if value.number not in self.every][:1]
        reached = self.behind(start)
        own = self.numbers[number]
        others = [at for at, of in enumerate(self.numbers) if at != number and reached & (of - own)]
        if others or not number or reached & own:
            return tuple(others)
        # Without any state behind them they may come from parameters alone, or from the model's input.
        return (-1,) if any(self.graph.values[n].kind == INPUT for n in reached) else ()

    def _other_tokens(self, number: int) -> tuple[float, bool]:
        """The share of the gradient of one token's coefficients at other tokens; whether some of these come later."""
        branch, found = self.branch_inputs(number), self.found[number].values()
        lead, token = self.batch_size * self.tokens, self.tokens // 2
        firsts = [of[0] for of in found if of and not self.behind(of[:1]) & branch and not of[0].numel % lead]
        state = self.first_of(self.connections[number].depth_in)
        lengths = {of.number: of.numel // lead for of in firsts}

        def of_token(of: TracedValue, tensor: torch.Tensor) -> torch.Tensor | None:
            one = per_token(tensor, (lengths[of.number],), self.batch_size, self.tokens)
            return next((each[0, token] for each in one), None)

        gradients = self.gradients(firsts, state, of_token)
        if not gradients:
            return 0.0, False
        sizes = self.norms(gradients, state)
        total, own = float(sizes.sum()), float(sizes[0, token])
        later = bool((sizes[0, token + 1 :] > SAME * sizes.max()).any())
        return (max(0.0, 1.0 - own / total) if total > 0 else 0.0), later

    def _unused_matrix(self, number: int) -> torch.Tensor | None:
        """A matrix that was computed from parameters within a connection, and that no output depends on."""
        graph, mix, begin = self.graph, self.weights[number]["H_res"], self.states[number][0].number
        n, end = mix.shape[-1], self.state(self.connections[number].depth_out)[0].number
        sizes = self.sizes(n * n)

        def square(first: int) -> list[TracedValue]:
            # Of n · n numbers there are others, such as the gain of a norm of that width: the two axes must be there.
            made = (v for v in graph.values[first:end] if v.shape[-2:] == (n, n) and v.numel in sizes)
            # What autograd keeps for the backward is another detached tensor of one that is there.
            return [
                v for v in made if v.is_floating and (v.name not in ("detach", "alias") or graph.takers(v))
            ]

        dead = [value for value in square(begin) if not graph.reaches_output(value)]
        if not dead:
            return None
        last, branch = dead[-1], self.branch_inputs(number)
        behind = graph.ancestors([last.number], stop=self.every | branch)
        # What is computed from the branch's input is the branch's own affair, such as the scores of its attention.
        if behind & branch or not self.has_parameter(behind):
            return None
        # What it was made of may be used: as the matrix itself, where this is a statistic for a log, or beside the read
        # weights in one tensor.
        used = [v for v in square(0) if v.number in behind and graph.reaches_output(v)]
        if used and self._takes_part(number, used[-1]):
            return None
        matrix = next(self.sampled(last, (n, n)), None)
        if matrix is None:
            return None
        # One that another connection applies is a copy, as for a log.
        applied = [m for of in self.weights for m in (of["H_res"], of["H_res"].mT)]
        limit = SAME * max(1.0, float(mix.abs().max()))
        return None if any(float((matrix - m).abs().max()) <= limit for m in applied) else matrix

    def _takes_part(self, number: int, value: TracedValue) -> bool:
        """Whether the numbers of a value have a share in the factors of a connection, or in the output by another way."""
        factors = self.factors[number]
        if self.graph.earlier(self.graph.outputs, stop={of.number for of in factors})[value.number]:
            return True
        gradients = self.gradients(factors, [value], lambda _, tensor: tensor.flatten())
        return not gradients or bool(gradients[0].any())

    def _sigmoids(self, number: int) -> Iterator[tuple[str, float]]:
        """The factors c of weights (K, T, n) that are c · σ(·)."""
        precision = max(CONSTANT, 2 * torch.finfo(self.precision).eps)
        values = [value for value in self.behind_factors[number] if value.name == "sigmoid"]
        for name, wanted in self.weights[number].items():
            tail = tuple(wanted.shape[2:])
            ratios = (
                wanted / few for value in values if name != "H_res" for few in self.sampled(value, tail)
            )
            known = (of for of in ratios if float(of.max() - of.min()) <= precision * float(of.mean()))
            if (ratio := next(known, None)) is not None:
                yield name, float(ratio.mean())
