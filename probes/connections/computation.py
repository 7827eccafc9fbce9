"""From what were the coefficients of the connections computed, and what became of them? Read in one recorded forward.

Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from depthscope.probes.connections.coefficient_values import CoefficientValues
from depthscope.probes.connections.proof import SAME, per_token
from depthscope.probes.reading.graph import INPUT, TracedValue

UNIFORM = 1e-3  # of every entry from 1/n; a heuristic
CONSTANT = 1e-3  # of a factor, relative: some models add 1e-6 to their sigmoids; a heuristic
CASTS = (torch.bfloat16, torch.float16)  # eight-bit types need a scale, which is not tried


@dataclass(frozen=True)
class Origin:
    """From what the coefficients of one connection were computed; all empty where they were not found in the forward.

    ``gradients``: the largest gradients of the matrix's logits and of the write weights, for a random combination of the
    next state, where every entry of the matrix is 1/n.
    ``is_cut``: whether autograd knows the write weights, and not the matrix, though parameters lie behind it.
    ``other_states``: by weights (H_res, H_pre, H_post): at which connections the states are that they were computed
    from though they are not this connection's own; −1 for the model's input.
    ``other_tokens``: the share of the gradient of one token's coefficients that falls on the states of other tokens.
    ``unused``: a matrix (K, T, n, n) that was computed from parameters for this connection, and that no output
    depends on.
    ``sigmoids``: by weights (H_pre, H_post): the factor c where they are c · σ(·).
    ``reads_along``: where one matrix has the read weights in its first columns and the mixing in its others: whether
    both are applied along the same axis; None where no matrix has both.
    """

    gradients: tuple[float, float] | None = None
    is_cut: bool = False
    other_states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    other_tokens: float = 0.0
    later: bool = False  # whether some of these tokens come later in the sequence
    unused: torch.Tensor | None = None
    sigmoids: Mapping[str, float] = field(default_factory=dict)
    # Whether the matrix is applied as the transpose of what was computed first; None where that is symmetric.
    turned: bool | None = None
    reads_along: bool | None = None

    def at(self, positions: Sequence[int]) -> Origin:
        """That of some of the sequences."""
        tensors = {
            of.name: t[positions]
            for of in fields(self)
            if isinstance(t := getattr(self, of.name), torch.Tensor)
        }
        return replace(self, **tensors)


class Search(CoefficientValues):
    """What is known of the coefficients of each connection, by a forward with a graph."""

    def origin(self, number: int) -> Origin:
        """What is known of one connection."""
        found, mix = self.found[number], self.found[number].get("H_res", [])
        share, later = self._other_tokens(number)
        origin = Origin(
            other_states={
                name: at for name, values in found.items() if (at := self._other_states(number, values))
            },
            other_tokens=share,
            later=later,
            unused=self._unused_matrix(number),
            sigmoids=self._sigmoids(number),
            turned=self._is_transposed(number, mix),
            reads_along=self._reads_along(number, mix),
            gradients=self._gradients_of_uniform(number, mix),
            is_cut=self._is_cut(number, mix),
        )
        self.rerun.forget(self.numbers[number])
        return origin

    def _is_cut(self, number: int, mix: Sequence[TracedValue]) -> bool:
        write = self.found[number].get("H_post", [])
        is_known = bool(mix and write) and write[-1].has_graph and not mix[-1].has_graph
        return is_known and bool(self.parameters_in(self.behind(mix[:1])))

    def _gradients_of_uniform(self, number: int, mix: Sequence[TracedValue]) -> tuple[float, float] | None:
        matrix, write = self.weights[number]["H_res"], self.found[number].get("H_post", [])
        behind = self.behind(mix)
        squares = [value for value in self.squares(number) if value.number in behind]
        # The first that parameters made: the logits, or what a normalisation makes of them, which is uniform as well.
        logits = [value for value in squares if self.parameters_in(self.behind([value]))][:1]
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
        """The share of the gradient of one token's coefficients at other tokens; whether some of these come later.

        Coefficients of what the branch gives, as AltUp's writes are, have the tokens that the branch looks at.
        """
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
        graph, mix, (begin, end) = self.graph, self.weights[number]["H_res"], self.window(number)
        n = mix.shape[-1]
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
        if behind & branch or not self.parameters_in(behind):
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

    def _sigmoids(self, number: int) -> dict[str, float]:
        values = [value for value in self.behind_factors[number] if value.name == "sigmoid"]
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
                precision = max(CONSTANT, 2 * torch.finfo(self.precision).eps)
                if float(ratio.max() - ratio.min()) <= precision * float(ratio.mean()):
                    return float(ratio.mean())
        return None
