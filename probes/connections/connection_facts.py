"""What is known of each connection of a model? The facts that remarks are made of, and the form of a remark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from depthscope.probes.connections.computation import Origin

# Heuristics: a sum of float32 numbers of n streams that was made 1 by a division is so within a few roundings.
EXACT_SUM = 1e-5
# An error of a sum that no rounding explains, in float32.
CLEAR_ERROR = 1e-3


@dataclass(frozen=True)
class Remark:
    """One thing that is odd about the connections.

    ``kind``: what it is, which is the name of the verdict that reports it.
    ``sentence``: in plain words, with the numbers.
    ``value``: the number that it rests on; that verdict states what it is compared with.
    ``connections``: where.
    ``sure``: whether it is an error in any design; otherwise it may be meant, and is only worth knowing.
    """

    kind: str
    sentence: str
    value: float
    connections: tuple[int, ...]
    sure: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"connections": list(self.connections)}


@dataclass(frozen=True)
class Facts:
    """What is known of one connection, of the sampled sequences.

    ``name``: the module that it belongs to.
    ``mix``: H_res as applied (K, T, n, n), and the identity where nothing mixes.
    ``mixes``: whether the model computes a matrix.
    ``stored``: H_res before the model rounded it to another precision.
    ``read, write``: H_pre and H_post (K, T, n); None where there are several views, or gates per feature.
    ``mask``: (K, T), True on tokens that are no padding.
    ``origin``: from what the weights were computed; None where no forward was followed.
    ``spread_in, spread_out``: ‖X − mean over streams‖ / ‖X‖ of the streams before and after the connection.
    """

    name: str
    mix: torch.Tensor
    mixes: bool
    stored: torch.Tensor
    read: torch.Tensor | None = None
    write: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    origin: Origin | None = None
    spread_in: float = 1.0
    spread_out: float = 1.0

    def tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens that are no padding, (tokens, …), in float64."""
        flat = weights.flatten(0, 1).double()
        return flat if self.mask is None else flat[self.mask.flatten()]

    @property
    def num_streams(self) -> int:
        """Number of streams n."""
        return self.mix.shape[-1]

    def sum_errors(self, matrix: torch.Tensor | None = None) -> tuple[float, float]:
        """The largest error of a row's sum (over sources) and of a column's (over destinations), against 1."""
        values = self.tokens(self.stored if matrix is None else matrix)
        return float((values.sum(-1) - 1).abs().max()), float((values.sum(-2) - 1).abs().max())


Rule = Callable[[Sequence[Facts]], Iterator[Remark]]


def places(facts: Sequence[Facts], at: Sequence[int]) -> str:
    """Some connections in words."""
    if len(at) == len(facts):
        return f"at all {len(facts)} connections" if len(at) > 1 else f"at {facts[0].name}"
    names = ", ".join(f"{number} ({facts[number].name})" for number in at[:3])
    more = f" and {len(at) - 3} more" if len(at) > 3 else ""
    return f"at connection{'s' if len(at) > 1 else ''} {names}{more} of {len(facts)}"


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}"


# Rounds of Sinkhorn that a matrix shows. A heuristic: implementations make 10 to 50; one normalisation shows less than 1
# unless the matrix is nearly the identity.
FEW_ROUNDS = 1.2
MEASURED_ROUNDS = 3  # after which the error falls by the same factor in each round, nearly; a heuristic
FAR = 0.1  # an error of a sum that no implementation of Sinkhorn leaves on logits that it can converge on; a heuristic


def one_sided(facts: Facts, side: int) -> bool:
    """Whether the sums of one side (0 rows, 1 columns) alone are exact, by a normalisation and not by truncation."""
    errors = facts.sum_errors()
    if errors[side] > EXACT_SUM or errors[1 - side] <= CLEAR_ERROR:
        return False
    rounds = _rounds(facts, -1 - side)
    axes = facts.origin.axes if facts.origin is not None else ()
    along = {each.axis for each in axes if not each.turned and each.size != 1}
    if not along or 0 in along:  # the code does not show it: only what is clear by itself is said
        return rounds < FEW_ROUNDS and errors[1 - side] > FAR
    normalised = [each.number for each in axes if not each.turned]
    between = any(each.turned and normalised[0] < each.number < normalised[-1] for each in axes)
    # With an exchange of the axes between them, normalisations along one axis of the code may be along both.
    return len(along) == 1 and (not between or rounds < FEW_ROUNDS)


def _once_more(matrix: torch.Tensor, last: int) -> torch.Tensor:
    """One round of Sinkhorn that ends with the sums along ``last`` (−1 rows, −2 columns) exact."""
    first = -3 - last
    matrix = matrix / matrix.sum(first, keepdim=True)
    return matrix / matrix.sum(last, keepdim=True)


def _inexact(matrix: torch.Tensor, last: int) -> torch.Tensor:
    return (matrix.sum(-3 - last) - 1).abs().amax(-1)


def _rounds(facts: Facts, last: int) -> float:
    """How many rounds of Sinkhorn the errors of the sums show, the median over tokens.

    Close to its limit Sinkhorn divides the error by the same factor ρ in each round, which a few more rounds on the matrix
    itself measure; an error e is then what ln e / ln ρ rounds leave of an error of 1.
    """
    matrix = facts.tokens(facts.stored)
    if not (matrix >= 0).all() or not (matrix.sum(-1) > 0).all() or not (matrix.sum(-2) > 0).all():
        return 0.0
    error = _inexact(matrix, last)
    again = matrix
    for _ in range(MEASURED_ROUNDS):
        again = _once_more(again, last)
    left = _inexact(again, last)
    factor = ((left / error.clamp_min(1e-300)) ** (1 / MEASURED_ROUNDS)).clamp(1e-12, 1 - 1e-9)
    known = error > EXACT_SUM
    if not known.any():
        return math.inf
    return float((error[known].clamp_max(1 - 1e-9).log() / factor[known].log()).median())
