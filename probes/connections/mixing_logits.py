"""What are the logits of H_res, and how much of its gradient reached them? Of every connection of a recorded forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from depthscope.probes.connections.computation import Doubt, Origin, Search
from depthscope.probes.connections.logits import NOT_SEEN, FoundLogits, find_logits, is_same_matrix
from depthscope.probes.reading.graph import TracedValue, ValuePlace

GRADIENTS = ("logit_gradient", "mixing_gradient")


@dataclass(frozen=True)
class MixingLogits:
    """The logits of one connection, or why they are not known.

    ``why``: empty where they are known.
    ``logits``: (K, T, n, n) of the sampled sequences of the first batch, rows are destinations.
    ``logit_gradient, mixing_gradient``: ‖∂L/∂H̃‖_F and ‖∂L/∂H_res‖_F over all tokens of that batch; NaN without a
    loss, 0 where none arrives.
    """

    why: str = ""
    logits: torch.Tensor | None = None
    logit_gradient: float = math.nan
    mixing_gradient: float = math.nan

    def at(self, positions: Sequence[int]) -> MixingLogits:
        """Those of some of the sequences."""
        return self if self.logits is None else replace(self, logits=self.logits[positions])


@dataclass
class CoefficientOrigins:
    """What is known of the coefficients of all connections in the sampled sequences of one batch.

    ``indices``: of these sequences, over all forwards.
    ``tokens``: T.
    ``origins, logits``: by connection.
    ``doubts``: where the gradients are of matrices that may not learn.
    ``pairs``: where logits and matrix are whose gradients are wanted and did not arrive in the backward of this search.
    """

    indices: list[int]
    tokens: int
    origins: list[Origin] = field(default_factory=list)
    logits: list[MixingLogits] = field(default_factory=list)
    doubts: dict[int, Doubt] = field(default_factory=dict)
    pairs: dict[int, tuple[ValuePlace, ValuePlace]] = field(default_factory=dict)

    def set_gradient(self, number: int, name: str, norm: float) -> None:
        """Note ‖∂L/∂H̃‖ (``logit_gradient``) or ‖∂L/∂H_res‖ (``mixing_gradient``) of a connection."""
        changed: dict[str, Any] = {name: norm}
        self.logits[number] = replace(self.logits[number], **changed)


def mixing_logits(search: Search, number: int) -> tuple[MixingLogits, FoundLogits | None]:
    """The logits of a connection, and the values that are these and its matrix."""
    graph, wanted = search.graph, search.weights[number]["H_res"]
    found = search.found[number].get("H_res", [])
    if not found:
        return MixingLogits(NOT_SEEN), None
    behind = search.behind(found[-1:])
    # The matrix may be a part of what reads and mixes, and was computed before: whatever leads to that. A copy for a log is
    # not what is applied.
    known = {value.number for value in found}
    squares = [value for value in search.squares(number) if value.number in behind]

    def is_matrix(value: TracedValue) -> bool:
        at: dict[str, Any] = {"batch": search.batch_size, "tokens": search.tokens, "rows": search.rows}
        return value.number in known or is_same_matrix(search.tensor(value), wanted, **at)

    place = find_logits(
        graph,
        [value for value in squares if value.number < found[-1].number],
        [value for value in squares if graph.reaches_output(value) and is_matrix(value)],
        wanted,
        behind,
        search.tensor,
        search.learns,
        batch=search.batch_size,
        tokens=search.tokens,
        rows=search.rows,
        rounding=torch.finfo(search.precision).eps,
    )
    if isinstance(place, str):
        return MixingLogits(place), None
    logits = search.tensor(place.logits)
    every = place.turned(logits, search.batch_size, search.tokens, wanted.shape[-1])
    return MixingLogits(logits=every[search.rows].to("cpu", torch.float32)), place
