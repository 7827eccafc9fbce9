"""From what were the coefficients of the connections computed, and what became of them? Read in one recorded forward.

What multiplies the streams on their way from a state to the next, or what a branch gives, is followed in the graph back to the
states and parameters; which of these values is which coefficient, and in which orientation, its numbers say. What was not held
is run again. Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from depthscope.probes.connections.coefficients import Parts, per_token
from depthscope.probes.connections.logits import SAME
from depthscope.probes.reading.description import ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import (
    INPUT,
    PARAMETER,
    Graph,
    ReadingError,
    TracedValue,
    ValuePlace,
    names,
    walk,
)
from depthscope.probes.reading.operations import MATRICES, MOVES, addends, moved
from depthscope.probes.reading.rerun import Rerun

UNIFORM = 1e-3  # of every entry from 1/n; a heuristic
CONSTANT = 1e-3  # of a factor, relative: some models add 1e-6 to their sigmoids; a heuristic
# Operations that normalise, or give what a division normalises by, with the position of their axes; those that only make
# the numbers smaller; and those that exchange axes.
REDUCTIONS = {
    "sum": 1, "mean": 1, "_softmax": 1, "_safe_softmax": 1, "_log_softmax": 1, "logsumexp": 1, "linalg_vector_norm": 2,
}  # fmt: skip
EXTREMES = names("max amax min amin")
TURNS = names("transpose permute t")
MOST_VIEWS = 2  # branch inputs of a matrix that reads and mixes: more are rare
CASTS = (torch.bfloat16, torch.float16)  # eight-bit types need a scale, which is not tried


@dataclass(frozen=True)
class Reduction:
    """An operation that normalises a matrix along an axis, or reduces it.

    ``number``: of its result in the graph.
    ``axis``: counted from the end (−1 is the last); 0 where it is not known.
    ``size``: of that axis.
    ``turned``: whether axes were exchanged, and nothing else.
    """

    number: int
    axis: int
    size: int
    turned: bool = False


def _reductions(value: TracedValue, squares: set[int], vectors: set[int]) -> Iterator[Reduction]:
    """What an operation makes of a matrix, where it normalises, reduces or turns it."""
    matrix = value.args[0] if value.args else None
    if not isinstance(matrix, TracedValue) or matrix.numel not in squares:
        return
    rank = len(matrix.shape)
    if value.name in TURNS and value.numel == matrix.numel:
        yield Reduction(value.number, 0, 0, turned=True)
    elif value.name in REDUCTIONS and rank > 1:
        at = REDUCTIONS[value.name]
        axes = value.kwargs.get("dim", value.args[at] if len(value.args) > at else None)
        for axis in axes if isinstance(axes, (tuple, list)) else (axes,):
            if isinstance(axis, int):
                yield Reduction(value.number, axis - rank if axis >= 0 else axis, matrix.shape[axis])
    elif value.name not in EXTREMES and value.numel in vectors:
        yield Reduction(value.number, 0, 0)


@dataclass(frozen=True)
class Origin:
    """From what the coefficients of one connection were computed; all empty where they were not found in the forward.

    ``gradients``: the largest gradient of the matrix's logits, and of the write weights, for a random combination of
    the model's outputs; None where autograd has no path to the logits. Known where the matrix is uniform, or some
    copy of it has no graph.
    ``other_states``: by weights (H_res, H_pre, H_post): at which connections the states are that they were computed
    from though they are not this connection's own; −1 for the model's input.
    ``other_tokens``: the share of the gradient of one token's coefficients that falls on the states of other tokens.
    ``later``: whether some of these tokens come later in the sequence.
    ``unused``: a matrix (K, T, n, n) that was computed from parameters for this connection, and that no output
    depends on.
    ``sigmoids``: by weights (H_pre, H_post): the factor c where they are c · σ(·).
    ``axes``: along which axes the matrix was normalised.
    ``exact``: the matrix (K, T, n, n) as it is applied, where it was read in half precision only.
    ``turned``: whether the matrix is applied as the transpose of what was computed first; None where that is
    symmetric.
    ``stored``: the matrix (K, T, n, n) of higher precision of which the applied one is a rounding.
    ``rounded_to``: to which type it was cast.
    ``reads_along``: where one matrix has the read weights in its first columns and the mixing in its others: whether
    both are applied along the same axis; None where no matrix has both.
    """

    gradients: tuple[float | None, float] | None = None
    other_states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    other_tokens: float = 0.0
    later: bool = False
    unused: torch.Tensor | None = None
    sigmoids: Mapping[str, float] = field(default_factory=dict)
    axes: tuple[Reduction, ...] = ()
    exact: torch.Tensor | None = None
    turned: bool | None = None
    stored: torch.Tensor | None = None
    rounded_to: str = ""
    reads_along: bool | None = None

    def at(self, positions: Sequence[int]) -> Origin:
        """That of some of the sequences."""
        tensors = {
            of.name: t[positions]
            for of in fields(self)
            if isinstance(t := getattr(self, of.name), torch.Tensor)
        }
        return replace(self, **tensors)


class Doubt(NamedTuple):
    """Where to look for the gradients of a connection whose matrix may not learn.

    ``squares``: of what the matrix was computed from, the values of its size, in order: the first that has a graph is
    the logits. Of a parameter the name.
    ``parameters``: names of those that it was computed from.
    ``write``: the write weights.
    """

    squares: tuple[ValuePlace | str, ...]
    parameters: tuple[str, ...]
    write: ValuePlace | str


def vector(weights: torch.Tensor | None) -> torch.Tensor | None:
    """Weights (K, T, n) of a connection with one view."""
    if weights is None or 1 not in weights.shape[-2:]:
        return None
    return weights.flatten(-2)


def _distinguishable(states: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """The values of each state together with those of all states that it shares some with, which may be any of them."""
    groups: list[frozenset[int]] = []
    for own in states:
        shared = [group for group in groups if group & own]
        groups = [group for group in groups if group not in shared] + [own.union(*shared)]
    return [next((group for group in groups if group & own), own) for own in states]


@dataclass
class Recorded:
    """One forward with streams, whose tensors are held.

    ``graph``: of its operations.
    ``memory, connections``: what was read in it, of all connections in order.
    ``parts``: their coefficients in the sampled sequences (K, T, …), on the CPU.
    ``batch_size, tokens``: B and T.
    ``rows``: the sequences of this batch that were sampled.
    ``precision``: in which the model multiplies its states: weights that were read by running operations once more
    are rounded to it.
    ``autocast``: whether torch's autocast multiplied the states.
    ``norms``: ``norms(tensors, values)`` are the norms (B, T) of what has the elements of some values of the memory.
    """

    graph: Graph
    memory: MemoryReading
    connections: Sequence[ConnectionReading]
    parts: Sequence[Parts]
    batch_size: int
    tokens: int
    rows: list[int]
    precision: torch.dtype
    autocast: bool
    norms: Callable[[Sequence[torch.Tensor], Sequence[TracedValue]], torch.Tensor]

    def state(self, depth: int) -> list[TracedValue]:
        """The values that are a state, in this order of its elements or another one, the earliest first."""
        values = (self.graph.values[number] for number in self.memory.states[depth].values)
        return sorted(walk(values, partial(moved, self.graph)), key=lambda value: value.number)

    def first_of(self, depth: int) -> list[TracedValue]:
        """For each value of a state, the earliest that has the same elements."""
        same = (
            walk([self.graph.values[n]], partial(moved, self.graph)) for n in self.memory.states[depth].values
        )
        carried = ([value for value in of if value.number in self.memory.carried] for of in same)
        return list(dict.fromkeys(min(of, key=lambda value: value.number) for of in carried))


class Search:
    """The search for the coefficients of all connections in what one forward computed.

    ``forward``: what it computed.
    ``weights``: for each connection its coefficients, by their names (H_res, H_pre, H_post).
    ``found``: likewise the values that are these.
    """

    def __init__(self, forward: Recorded):
        self.forward, self.graph = forward, forward.graph
        self.rerun = Rerun(self.graph)
        self._evident = any(value.has_graph and not value.kind for value in self.graph.values)
        self.states = [forward.state(of.depth_in) for of in forward.connections]
        self.numbers = _distinguishable([frozenset(value.number for value in found) for found in self.states])
        self.every = frozenset[int]().union(*self.numbers)
        self.weights = [_weights(parts) for parts in forward.parts]
        self.found: list[dict[str, list[TracedValue]]] = []
        self._factors: list[list[TracedValue]] = []
        self._behind: list[list[TracedValue]] = []  # what these were computed from, and they
        for number in range(len(forward.connections)):
            self._factors.append(list(dict.fromkeys(self._factors_of(number))))
            of_factors = self.graph.ancestors([of.number for of in self._factors[-1]], stop=self.every)
            self._behind.append([self.graph.values[n] for n in sorted(of_factors)])
            self.found.append(
                {name: self._matching(number, wanted) for name, wanted in self.weights[number].items()}
            )
            self.rerun.forget()

    def _factors_of(self, number: int) -> Iterator[TracedValue]:
        """What multiplies the streams between two states or on the way to what a branch reads, or what a branch gives."""
        connection, values, carried = (
            self.forward.connections[number],
            self.graph.values,
            self.forward.memory.carried,
        )
        reads = [self.graph.at(place) for branch in connection.branches for place in branch.reads]
        ends = [values[n] for n in self.forward.memory.states[connection.depth_out].values]
        ends += [read for read in reads if read is not None and read.number in carried]
        begins = self.every - {value.number for value in ends}

        def before(value: TracedValue) -> list[TracedValue]:
            return [p for p in value.parents if p.number in carried and p.number not in begins]

        steps = [(of, [p for p in of.parents if p.number in carried]) for of in walk(ends, before)]
        for branch in connection.branches:
            steps += [
                (values[n], [values[given]]) for given, n in zip(branch.way, branch.way[1:], strict=False)
            ]
        for step, taken in steps:
            others = (
                {of.number for of in (*taken, *addends(step))}
                if taken
                else {of.number for of in step.parents}
            )
            yield from (
                p
                for p in step.parents
                if p.is_floating and p.number not in others and p.number not in carried
            )

    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value of the forward."""
        return self.rerun.tensor(value)

    def _sizes(self, *of_token: int) -> set[int]:
        """How many numbers a tensor has with so many for each token, or for all of them together."""
        lead = self.forward.batch_size * self.forward.tokens
        return {count for size in of_token for count in (size, lead * size)}

    def per_token(self, value: TracedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A value as (B, T, *tail) in the ways that its shape allows; none where its tensor cannot be had."""
        try:
            tensor = self.tensor(value)
        except ReadingError:
            return
        yield from per_token(tensor, tail, self.forward.batch_size, self.forward.tokens)

    def _matching(self, number: int, wanted: torch.Tensor) -> list[TracedValue]:
        """The values among what the factors were computed from that are some coefficients (K, T, *tail), or their transpose.

        A matrix may be a part of one that reads too: its last columns, source by destination.
        """
        limit = SAME * max(1.0, float(wanted.abs().max()))
        tail = tuple(wanted.shape[2:])
        more = [tail[0] * (tail[0] + views) for views in range(1, MOST_VIEWS + 1)] if len(tail) == 2 else []
        sizes, first = self._sizes(math.prod(tail), *more), wanted[0, 0].flatten().tolist()
        return [
            value
            for value in self._behind[number]
            if value.numel in sizes
            and value.is_floating
            and any(self._equal(each, wanted, first, limit) for each in self._readings(value, tail))
        ]

    def _readings(self, value: TracedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        matrix = len(tail) == 2
        for each in self.per_token(value, tail):
            yield from (each, each.mT) if matrix else (each,)
        for views in range(1, MOST_VIEWS + 1) if matrix else ():
            for each in self.per_token(value, (tail[0], tail[0] + views)):
                yield from (each[..., views:], each[..., views:].mT)

    def _equal(
        self, tensor: torch.Tensor, wanted: torch.Tensor, first: Sequence[float], limit: float
    ) -> bool:
        """Whether weights (B, T, …) of all sequences are these (K, T, …) of the sampled ones, whose first token is given."""
        # One token first, as plain numbers: most candidates differ everywhere.
        rounding, rows = torch.finfo(self.forward.precision).eps, self.forward.rows
        for one, other in zip(tensor[rows[0], 0].flatten().tolist(), first, strict=True):
            if abs(one - other) > 2 * limit + rounding * abs(one):
                return False
        few = tensor[rows].to(wanted.device, torch.float32)
        rounded = torch.equal(few.to(self.forward.precision).float(), wanted)
        return rounded or bool((few - wanted).abs().max() <= limit)

    def _window(self, number: int) -> tuple[int, int]:
        """The part of the forward from the first value that is this connection's state to the one that is the next state."""
        after = self.forward.state(self.forward.connections[number].depth_out)
        return self.states[number][0].number, after[0].number

    def origin(self, number: int) -> Origin:
        """What is known of one connection without its gradients."""
        found, mix = self.found[number], self.found[number].get("H_res", [])
        behind = self.behind(mix[:1])
        first = [v.number for v in self.squares(number) if v.number in behind]
        chain = self.graph.ancestors([v.number for v in mix[-1:]], stop=frozenset(first[:1]) | self.every)
        share, later = self._other_tokens(number)
        origin = Origin(
            other_states={name: at for name, values in found.items() if (at := self._others(number, values))},
            other_tokens=share,
            later=later,
            unused=self._unused(number),
            sigmoids=self._sigmoids(number),
            axes=tuple(self._axes(number, chain)),
            turned=self._turned(number, mix),
            reads_along=self._reads_along(number, mix),
            **(self._before_rounding(number) or self._exact(number, mix)),
        )
        self.rerun.forget()
        return origin

    def _axes(self, number: int, chain: set[int]) -> Iterator[Reduction]:
        """Along which axes matrices were normalised, or turned, among some values."""
        n = self.weights[number]["H_res"].shape[-1]
        for each in sorted(chain):
            yield from _reductions(self.graph.values[each], self._sizes(n * n), self._sizes(n))

    def _turned(self, number: int, mix: Sequence[TracedValue]) -> bool | None:
        wanted = self.weights[number]["H_res"]
        n, first = wanted.shape[-1], wanted[0, 0].flatten().tolist()
        apart = float((wanted - wanted.mT).abs().max())
        # A matrix of two streams is nearly symmetric after Sinkhorn, and what it was before the last round nearly is its
        # transpose: as near as the square of what is left. Only the very same numbers tell the two apart then, and in
        # half precision these are rounded to the same.
        nearly = apart <= UNIFORM
        if apart <= SAME or (nearly and self.forward.precision in CASTS):
            return None
        limit = 0.0 if nearly else SAME
        for value in mix:
            for each in self.per_token(value, (n, n)):
                straight, turned = (self._equal(m, wanted, first, limit) for m in (each, each.mT))
                if straight or turned:
                    return None if straight and turned else turned
        return None

    def _before_rounding(self, number: int) -> dict[str, Any]:
        """The computed matrix that the applied one is a rounding of, where it is one."""
        wanted, square = self.weights[number]["H_res"], self.squares(number)
        for dtype in CASTS:
            # The rounded matrix itself must be there: a trace of a model in half precision reads rounded numbers in any case.
            cast = [
                value
                for value in square
                if value.dtype == dtype and not (self.forward.autocast and self._is_only_multiplied(value))
            ]
            if not any(self._is(value, wanted, dtype, rounded=False) is not None for value in cast):
                continue
            for value in square:
                finer = torch.finfo(value.dtype).eps < torch.finfo(dtype).eps
                stored = self._is(value, wanted, dtype, rounded=True) if finer else None
                if stored is not None and not torch.equal(stored, wanted):
                    return {"stored": stored, "rounded_to": str(dtype).removeprefix("torch.")}
        return {}

    def _is_only_multiplied(self, value: TracedValue) -> bool:
        """Whether a matrix is only multiplied: where it is rounded, autocast may have done so."""
        return all(
            taker.name in MATRICES or (taker.name in MOVES and self._is_only_multiplied(taker))
            for taker in self.graph.takers(value)
        )

    def _exact(self, number: int, mix: Sequence[TracedValue]) -> dict[str, Any]:
        """The matrix in the precision in which it was computed, where reading it has rounded it."""
        wanted, dtype = self.weights[number]["H_res"], self.forward.precision
        for value in reversed(mix) if dtype in CASTS else ():
            if torch.finfo(value.dtype).eps < torch.finfo(dtype).eps:
                matrix = self._is(value, wanted, dtype, rounded=True)
                if matrix is not None:
                    return {"exact": matrix}
        return {}

    def sampled(self, value: TracedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A value as (K, T, *tail) of the sampled sequences, in the ways that its shape allows."""
        for each in self.per_token(value, tail):
            yield each[self.forward.rows].to("cpu", torch.float32)

    def _is(
        self, value: TracedValue, wanted: torch.Tensor, dtype: torch.dtype, *, rounded: bool
    ) -> torch.Tensor | None:
        """A value as a matrix (K, T, n, n) in the orientation in which it is the wanted one, rounded or as it stands."""
        n = wanted.shape[-1]
        for few in self.sampled(value, (n, n)):
            for matrix in (few, few.mT):
                if torch.equal(matrix.to(dtype).float() if rounded else matrix, wanted):
                    return matrix
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

    def behind(self, values: Sequence[TracedValue]) -> set[int]:
        """What some values were computed from, back to the states of the connections."""
        return self.graph.ancestors([value.number for value in values], stop=self.every)

    def squares(self, number: int) -> list[TracedValue]:
        """What a connection's factors were computed from and has the size of its matrix, in order."""
        n = self.weights[number]["H_res"].shape[-1]
        sizes = self._sizes(n * n)
        return [value for value in self._behind[number] if value.numel in sizes and value.is_floating]

    def _others(self, number: int, values: Sequence[TracedValue]) -> tuple[int, ...]:
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
        """The share of the gradient of one token's coefficients at other tokens; whether some of these come later.

        Coefficients of what the branch gives, as AltUp's writes are, have the tokens that the branch looks at.
        """
        branch, found = self._branch(number), self.found[number].values()
        lead, token = self.forward.batch_size * self.forward.tokens, self.forward.tokens // 2
        firsts = [of[0] for of in found if of and not self.behind(of[:1]) & branch and not of[0].numel % lead]
        state = self.forward.first_of(self.forward.connections[number].depth_in)
        lengths = {of.number: of.numel // lead for of in firsts}

        def of_token(of: TracedValue, tensor: torch.Tensor) -> torch.Tensor | None:
            one = per_token(tensor, (lengths[of.number],), self.forward.batch_size, self.forward.tokens)
            return next((each[0, token] for each in one), None)

        gradients = self._gradients(firsts, state, of_token)
        if not gradients:
            return 0.0, False
        sizes = self.forward.norms(gradients, state)
        total, own = float(sizes.sum()), float(sizes[0, token])
        later = bool((sizes[0, token + 1 :] > SAME * sizes.max()).any())
        return (max(0.0, 1.0 - own / total) if total > 0 else 0.0), later

    def _unused(self, number: int) -> torch.Tensor | None:
        """A matrix that was computed from parameters within a connection, and that no output depends on."""
        graph, mix, (begin, end) = self.graph, self.weights[number]["H_res"], self._window(number)
        n = mix.shape[-1]
        sizes = self._sizes(n * n)

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
        last, branch = dead[-1], self._branch(number)
        behind = graph.ancestors([last.number], stop=self.every | branch)
        # What is computed from the branch's input is the branch's own affair, such as the scores of its attention.
        if behind & branch or not self._parameters(behind):
            return None
        # What it was made of may be used: as the matrix itself, where this is a statistic for a log, or beside the read
        # weights in one tensor.
        used = [v for v in square(0) if v.number in behind and graph.reaches_output(v)]
        if used and self._takes_part(number, used[-1]):
            return None
        matrix = next(self.sampled(last, (n, n)), None)
        if matrix is None:
            return None
        limit = SAME * max(1.0, float(mix.abs().max()))
        same = min(float((matrix - mix).abs().max()), float((matrix.mT - mix).abs().max())) <= limit
        return None if same else matrix

    def _takes_part(self, number: int, value: TracedValue) -> bool:
        """Whether the numbers of a value have a share in the factors of a connection, or in the output by another way."""
        factors = self._factors[number]
        if self.graph.earlier(self.graph.outputs, stop={of.number for of in factors})[value.number]:
            return True
        gradients = self._gradients(factors, [value], lambda _, tensor: tensor.flatten())
        return not gradients or bool(gradients[0].any())

    def _gradients(
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

    def _parameters(self, numbers: set[int]) -> list[TracedValue]:
        """The parameters among some values."""
        return [self.graph.values[n] for n in sorted(numbers) if self.graph.values[n].kind == PARAMETER]

    def _branch(self, number: int) -> set[int]:
        """The values that are what a connection's branches take."""
        reads = (self.graph.at(at) for of in self.forward.connections[number].branches for at in of.reads)
        taken = walk((read for read in reads if read is not None), partial(moved, self.graph))
        return {value.number for value in taken} - self.every

    def _sigmoids(self, number: int) -> dict[str, float]:
        values = [value for value in self._behind[number] if value.name == "sigmoid"]
        found = {
            name: self._sigmoid_factor(wanted, values)
            for name, wanted in self.weights[number].items()
            if name != "H_res"
        }
        return {name: factor for name, factor in found.items() if factor is not None}

    def _sigmoid_factor(self, wanted: torch.Tensor, values: Sequence[TracedValue]) -> float | None:
        """The factor c of weights (K, T, n) that are c · σ(·); None where they are not."""
        for value in values:
            for few in self.sampled(value, tuple(wanted.shape[2:])):
                ratio = wanted / few
                precision = max(CONSTANT, 2 * torch.finfo(self.forward.precision).eps)
                if float(ratio.max() - ratio.min()) <= precision * float(ratio.mean()):
                    return float(ratio.mean())
        return None

    def doubt(self, number: int) -> Doubt | None:
        """Where to look for the gradients of a connection whose matrix may not learn; None where it does."""
        found, matrix = self.found[number], self.weights[number]["H_res"]
        mix, write, n = found.get("H_res", []), found.get("H_post", []), matrix.shape[-1]
        parameters = self._parameters(self.behind(mix[:1]))
        if not mix or not write or not parameters:
            return None
        # A copy that a log keeps is not used, and may carry none.
        same = [v for v in mix if v.numel == mix[0].numel and self.graph.reaches_output(v)]
        if all(v.has_graph for v in same) and float((matrix - 1 / n).abs().max()) > UNIFORM:
            return None
        behind, known = self.behind(mix), self.graph.parameter_names

        def place(value: TracedValue) -> ValuePlace | str:
            return known[value.number] if value.number in known else self.graph.place(value)

        squares = tuple(place(value) for value in self.squares(number) if value.number in behind)
        return Doubt(squares, tuple(known[value.number] for value in parameters), place(write[-1]))

    def learns(self, value: TracedValue) -> bool:
        """Whether autograd knew of a value, as far as it knew of anything that its parameters made."""
        evident = self._evident and any(of.has_graph for of in self._parameters(self.behind([value])))
        return value.has_graph or not evident


def _weights(parts: Parts) -> dict[str, torch.Tensor]:
    """The coefficients of a connection by their names: H_res (K, T, n, n), H_pre and H_post (K, T, n) of one view."""
    n = parts.write.shape[-2]
    mix = torch.eye(n).expand(*parts.write.shape[:-1], n) if parts.mix is None else parts.mix
    found = {"H_res": mix, "H_pre": vector(parts.read), "H_post": vector(parts.write)}
    return {name: of for name, of in found.items() if of is not None}
