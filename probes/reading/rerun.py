"""What was a value of a recorded forward, also one that was not held? Operations are run once more, from what was held."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from depthscope.probes.reading.graph import Graph, ReadingError, TracedValue, names, walk

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
