"""Was a matrix normalised along one axis alone, or did Sinkhorn end early? Told by how far its sums are from 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from depthscope.probes.connections.connection_facts import CLEAR_ERROR, EXACT_SUM, Facts

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


def after_rounds(facts: Sequence[Facts], at: Sequence[int], side: int) -> float:
    """The error that 20 rounds leave on these matrices."""
    worst = 0.0
    for number in at:
        matrix = facts[number].tokens(facts[number].stored).clamp_min(0)
        for _ in range(20):
            matrix = _once_more(matrix, -1 - side).nan_to_num()
        worst = max(worst, float(_inexact(matrix, -1 - side).max()))
    return max(worst, torch.finfo(torch.float32).eps)
