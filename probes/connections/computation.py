"""From what were the coefficients of the connections computed, and what became of them? Read in one recorded forward.

A coefficient is found among the small tensors of the forward by its value, and then followed in the graph back to the states
and parameters, and in autograd's for what it learns. Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from depthscope.probes.connections.computed_forward import ComputedForward
from depthscope.probes.connections.computed_values import ComputedValue
from depthscope.probes.connections.logits import SAME
from depthscope.probes.reading.graph import INPUT, TracedValue, names

UNIFORM = 1e-3  # of every entry from 1/n; a heuristic
CONSTANT = 1e-3  # of a factor, relative: some models add 1e-6 to their sigmoids; a heuristic
# Operations that normalise, or give what a division normalises by, with the position of their axes; those that only make
# the numbers smaller; and those that exchange axes.
REDUCTIONS = {
    "sum": 1, "mean": 1, "_softmax": 1, "_safe_softmax": 1, "_log_softmax": 1, "logsumexp": 1, "linalg_vector_norm": 2,
}  # fmt: skip
EXTREMES = names("max amax min amin")
TURNS = names("transpose permute t")
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


@dataclass(frozen=True)
class Applied:
    """The coefficients of one connection of the sampled sequences of one batch (K, T, …), before they are rounded to apply."""

    x_in: torch.Tensor
    x_out: torch.Tensor
    mix: torch.Tensor
    read: torch.Tensor | None
    write: torch.Tensor | None
    branch_in: torch.Tensor | None  # (K, T, D), of one view


def trace_origins(search: Search) -> list[Origin]:
    """From what the coefficients of every connection were computed."""
    numbers = range(len(search.applied))
    origins = [search.origin(number) for number in numbers]
    # One backward for all of them, and none where every matrix carries a gradient and is not uniform.
    asked = {number: found for number in numbers if (found := search.doubtful(number)) is not None}
    tensors = [tensor for logits, write in asked.values() for tensor in (*logits, write)]
    sizes = iter(search.forward.gradients(tensors) if tensors else [])
    for number, (logits, _) in asked.items():
        known = [size for _ in logits if (size := next(sizes)) is not None]
        write = next(sizes)
        # Without a path to either, such as where the model itself turns gradients off, nothing is known.
        gradients = None if write is None else (max(known, default=None), write)
        origins[number] = replace(origins[number], gradients=gradients)
    return origins


def _distinguishable(states: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """The values of each state together with those of all states that it shares some with, which may be any of them."""
    groups: list[frozenset[int]] = []
    for own in states:
        shared = [group for group in groups if group & own]
        groups = [group for group in groups if group not in shared] + [own.union(*shared)]
    return [next((group for group in groups if group & own), own) for own in states]


class Search:
    """The search for the coefficients of all connections in what one forward computed.

    ``forward``: what it computed.
    ``applied``: one for each connection, in order.
    ``found``: for each connection the values that are its coefficients, by their names (H_res, H_pre, H_post).
    """

    def __init__(self, forward: ComputedForward, applied: Sequence[Applied]):
        self.forward = forward
        self.applied = applied
        self.states = [forward.states(each.x_in) for each in applied]
        self.numbers = _distinguishable([frozenset(value.number for value in found) for found in self.states])
        self.every = frozenset[int]().union(*self.numbers)
        self.found: list[dict[str, list[ComputedValue]]] = [
            self._find(number) for number in range(len(applied))
        ]

    def _window(self, number: int) -> tuple[int, int] | None:
        """The part of the forward from the first value that is this connection's state to the one that is the next state."""
        after = self.forward.states(self.applied[number].x_out)
        if not self.states[number] or not after:
            return None
        return self.states[number][0].number, after[0].number

    def _find(self, number: int) -> dict[str, list[ComputedValue]]:
        window = self._window(number)
        if window is None:
            return {}
        applied = self.applied[number]
        weights = {"H_res": applied.mix, "H_pre": applied.read, "H_post": applied.write}
        # Weights may have been computed before this connection began: the nearest ones count.
        earlier = self.states[max(0, number - 2)]
        starts = [window[0], earlier[0].number if earlier else 0, 0]
        found: dict[str, list[ComputedValue]] = {}
        for name, wanted in weights.items():
            if wanted is None:
                continue
            for start in starts:
                found[name] = self.forward.matching(wanted, (start, window[1]))
                if found[name]:
                    break
        return found

    def origin(self, number: int) -> Origin:
        """What is known of one connection without its gradients."""
        window, found = self._window(number), self.found[number]
        if window is None:
            return Origin()
        share, later = self._other_tokens(number, window)
        mix = found.get("H_res", [])
        behind = self.behind(mix[:1])
        first = [v.number for v in self.squares(number, (0, window[1])) if v.number in behind]
        chain = self.forward.graph.ancestors(
            [v.number for v in mix[-1:]], stop=frozenset(first[:1]) | self.every
        )
        return Origin(
            other_states={name: at for name, values in found.items() if (at := self._others(number, values))},
            other_tokens=share,
            later=later,
            unused=self._unused(number, window),
            sigmoids=self._sigmoids(number, window),
            axes=tuple(self._axes(number, chain)),
            turned=self._turned(number, mix),
            reads_along=self._reads_along(number, mix),
            **(self._before_rounding(number, window) or self._exact(number, mix)),
        )

    def _axes(self, number: int, chain: set[int]) -> Iterator[Reduction]:
        """Along which axes matrices were normalised, or turned, among some values."""
        forward, n = self.forward, self.applied[number].mix.shape[-1]
        lead = forward.batch_size * forward.tokens
        for each in sorted(chain):
            yield from _reductions(forward.graph.values[each], {n * n, lead * n * n}, {n, lead * n})

    def _turned(self, number: int, mix: Sequence[ComputedValue]) -> bool | None:
        wanted = self.applied[number].mix
        n = wanted.shape[-1]
        apart = float((wanted - wanted.mT).abs().max())
        # A matrix of two streams is nearly symmetric after Sinkhorn, and what it was before the last round nearly is its
        # transpose: as near as the square of what is left. Only the very same numbers tell the two apart then, and in
        # half precision these are rounded to the same.
        nearly = apart <= UNIFORM
        if apart <= SAME or (nearly and self.forward.precision in CASTS):
            return None
        limit = 0.0 if nearly else SAME
        for value in mix:
            for each in self.forward.per_token(value.tensor.detach(), (n, n)):
                straight, turned = (self.forward.equal(m, wanted, limit) for m in (each, each.mT))
                if straight or turned:
                    return None if straight and turned else turned
        return None

    def _before_rounding(self, number: int, window: tuple[int, int]) -> dict[str, Any]:
        """The computed matrix that the applied one is a rounding of, where it is one."""
        wanted = self.applied[number].mix
        square = self.squares(number, window)
        for dtype in CASTS:
            # The rounded matrix itself must be there: a trace of a model in half precision reads rounded numbers in any case.
            cast = [
                value
                for value in square
                if value.tensor.dtype == dtype
                and not (self.forward.autocast and self.forward.is_only_multiplied(value.value))
            ]
            if not any(self._is(value, wanted, dtype, rounded=False) is not None for value in cast):
                continue
            for value in square:
                finer = torch.finfo(value.tensor.dtype).eps < torch.finfo(dtype).eps
                stored = self._is(value, wanted, dtype, rounded=True) if finer else None
                if stored is not None and not torch.equal(stored, wanted):
                    return {"stored": stored, "rounded_to": str(dtype).removeprefix("torch.")}
        return {}

    def _exact(self, number: int, mix: Sequence[ComputedValue]) -> dict[str, Any]:
        """The matrix in the precision in which it was computed, where reading it has rounded it."""
        wanted, dtype = self.applied[number].mix, self.forward.precision
        for value in reversed(mix) if dtype in CASTS else ():
            if torch.finfo(value.tensor.dtype).eps < torch.finfo(dtype).eps:
                matrix = self._is(value, wanted, dtype, rounded=True)
                if matrix is not None:
                    return {"exact": matrix}
        return {}

    def _sampled(self, value: ComputedValue, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A value as (K, T, *tail) of the sampled sequences, in the ways that its shape allows."""
        device = self.applied[0].mix.device
        for each in self.forward.per_token(value.tensor.detach(), tail):
            yield each[self.forward.rows].to(device, torch.float32)

    def _is(
        self, value: ComputedValue, wanted: torch.Tensor, dtype: torch.dtype, *, rounded: bool
    ) -> torch.Tensor | None:
        """A value as a matrix (K, T, n, n) in the orientation in which it is the wanted one, rounded or as it stands."""
        n = wanted.shape[-1]
        for few in self._sampled(value, (n, n)):
            for matrix in (few, few.mT):
                if torch.equal(matrix.to(dtype).float() if rounded else matrix, wanted):
                    return matrix
        return None

    def _reads_along(self, number: int, mix: Sequence[ComputedValue]) -> bool | None:
        applied = self.applied[number]
        n, read = applied.mix.shape[-1], applied.read
        for value in mix if read is not None else ():
            for few in self._sampled(value, (n, n + 1)):
                matrix, limit = few[..., 1:], SAME * max(1.0, float(few.abs().max()))
                # Each column, of the reads or of the mixing, is one result; its rows are the sources.
                straight, turned = (
                    float((m - applied.mix).abs().max()) <= limit for m in (matrix.mT, matrix)
                )
                if float((few[..., 0] - read).abs().max()) <= limit and straight != turned:
                    return straight
        return None

    def behind(self, values: Sequence[ComputedValue]) -> set[int]:
        """What some values were computed from, back to the states of the connections."""
        return self.forward.graph.ancestors([value.number for value in values], stop=self.every)

    def squares(self, number: int, window: tuple[int, int]) -> list[ComputedValue]:
        """The values of a part of the forward that have the size of a connection's matrix."""
        n = self.applied[number].mix.shape[-1]
        return list(self.forward.sized((n * n,), window))

    def _others(self, number: int, values: Sequence[ComputedValue]) -> tuple[int, ...]:
        """The connections whose states some coefficients were computed from, other than by way of their own state."""
        start = [value for value in values if value.number not in self.every][:1]
        reached = self.behind(start)
        own = self.numbers[number]
        others = [at for at, of in enumerate(self.numbers) if at != number and reached & (of - own)]
        if others or not number or reached & own:
            return tuple(others)
        # Without any state behind them they may come from parameters alone, or from the model's input.
        return (-1,) if any(self.forward.graph.values[n].kind == INPUT for n in reached) else ()

    def _other_tokens(self, number: int, window: tuple[int, int]) -> tuple[float, bool]:
        """The share of the gradient of one token's coefficients at other tokens; whether some of these come later.

        Coefficients of what the branch gives, as AltUp's writes are, have the tokens that the branch looks at.
        """
        forward, state = self.forward, self.states[number][0]
        branch = self._branch(number, window)
        terms, token = [], forward.tokens // 2
        generator = torch.Generator().manual_seed(0)
        for values in self.found[number].values():
            tensor = values[0].tensor if values else None
            if (
                tensor is None
                or self.behind(values[:1]) & branch
                or not tensor.requires_grad
                or tensor.numel() % (forward.batch_size * forward.tokens)
            ):
                continue
            size = tensor.numel() // (forward.batch_size * forward.tokens)
            one = next(forward.per_token(tensor, (size,)), None)
            if one is not None:
                terms.append((one[0, token].float().cpu() * torch.randn(size, generator=generator)).sum())
        if not terms or not state.tensor.requires_grad:
            return 0.0, False
        (gradient,) = torch.autograd.grad(
            torch.stack(terms).sum(), state.tensor, retain_graph=True, allow_unused=True
        )
        if gradient is None:
            return 0.0, False
        sizes = forward.canonical(gradient).float().flatten(2).norm(dim=-1)  # (B, T)
        total, own = float(sizes.sum()), float(sizes[0, token])
        later = bool((sizes[0, token + 1 :] > SAME * sizes.max()).any())
        return (max(0.0, 1.0 - own / total) if total > 0 else 0.0), later

    def _unused(self, number: int, window: tuple[int, int]) -> torch.Tensor | None:
        """A matrix that was computed from parameters within a connection, and that no output depends on."""
        forward, mix = self.forward, self.applied[number].mix
        n = mix.shape[-1]
        # Of n · n numbers there are others, such as the gain of a norm of that width: the two axes must be there.
        square = [v for v in self.squares(number, window) if v.tensor.shape[-2:] == (n, n)]
        dead = [value for value in square if not forward.is_used(value)]
        if not dead:
            return None
        last = dead[-1]
        branch = self._branch(number, window)
        behind = forward.graph.ancestors([last.number], stop=self.every | branch)
        # What is computed from the branch's input is the branch's own affair, such as the scores of its attention.
        if behind & branch:
            return None
        if not behind & forward.parameters.keys():
            return None
        # What it was made of may be used: as the matrix itself, where this is a statistic for a log, or beside the read
        # weights in one tensor. The gradient tells these apart.
        earlier = [v for v in self.squares(number, (0, window[1])) if v.tensor.shape[-2:] == (n, n)]
        used = [v for v in earlier if v.number in behind and forward.is_used(v)]
        if used and not (
            used[-1].tensor.requires_grad and forward.gradients([used[-1].tensor])[0] in (0.0, None)
        ):
            return None
        matrix = next(self._sampled(last, (n, n)), None)
        if matrix is None:
            return None
        limit = SAME * max(1.0, float(mix.abs().max()))
        same = min(float((matrix - mix).abs().max()), float((matrix.mT - mix).abs().max())) <= limit
        return None if same else matrix

    def _branch(self, number: int, window: tuple[int, int]) -> set[int]:
        """The values that are what a connection's branch takes."""
        taken = self.applied[number].branch_in
        return set() if taken is None else {v.number for v in self.forward.matching(taken, window)}

    def _sigmoids(self, number: int, window: tuple[int, int]) -> dict[str, float]:
        applied = self.applied[number]
        values = [value for value in self.forward.within(window) if value.value.name == "sigmoid"]
        weights = {"H_pre": applied.read, "H_post": applied.write}
        found = {
            name: self._sigmoid_factor(wanted, values)
            for name, wanted in weights.items()
            if wanted is not None
        }
        return {name: factor for name, factor in found.items() if factor is not None}

    def _sigmoid_factor(self, wanted: torch.Tensor, values: Sequence[ComputedValue]) -> float | None:
        """The factor c of weights (K, T, n) that are c · σ(·); None where they are not."""
        for value in values:
            for few in self._sampled(value, tuple(wanted.shape[2:])):
                ratio = wanted / few
                precision = max(CONSTANT, 2 * torch.finfo(self.forward.precision).eps)
                if float(ratio.max() - ratio.min()) <= precision * float(ratio.mean()):
                    return float(ratio.mean())
        return None

    def doubtful(self, number: int) -> tuple[Sequence[torch.Tensor], torch.Tensor] | None:
        """The logits and the write weights of a connection whose matrix may not learn."""
        found, matrix = self.found[number], self.applied[number].mix
        mix, write, n = found.get("H_res", []), found.get("H_post", []), matrix.shape[-1]
        window = self._window(number)
        if not mix or not write or window is None:
            return None
        parameters = self.behind(mix[:1]) & self.forward.parameters.keys()
        if not parameters:
            return None
        size = mix[0].tensor.numel()
        # A copy that a log keeps is not used, and may carry none.
        severed = any(
            self.forward.is_used(v) and v.tensor.numel() == size and not v.tensor.requires_grad for v in mix
        )
        if not severed and float((matrix - 1 / n).abs().max()) > UNIFORM:
            return None
        # An autograd function computes without a graph inside, and its result has one.
        behind = self.behind(mix)
        squares = (v for v in self.squares(number, (0, window[1])) if v.number in behind)
        logits = next((v.tensor for v in squares if v.tensor.requires_grad), None)
        # Where one function computes all of it, only the parameters tell whether there is a path.
        of = [logits] if logits is not None else [self.forward.parameters[i] for i in sorted(parameters)]
        return of, write[-1].tensor
