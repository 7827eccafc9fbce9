"""By what does a plain connection multiply the state and the branch's output? Found from them and the next state.

X' = a X + Σ b F for the branches F between two depths. Shapes: N real tokens, D features, P branches between two depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from depthscope.probes.connections.coefficients import relative_error, tolerance

# As many equations for each unknown, so that a fit that is exact to rounding cannot be chance. Heuristic.
EQUATIONS = 8

# Two of X and F that are parallel to this (the least eigenvalue of their normed Gram matrix) leave a and b open. Heuristic.
INDEPENDENT = 1e-6

# What is left unexplained has to be this small against the smallest branch: a factor that varies over tokens would otherwise
# pass for one number where the branch is small and the precision low. Heuristic.
SHARE = 0.1

# Factors of one number for all tokens are 1 where they are so near to it, and 1 gives the next state to rounding. Heuristic.
ONE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class PlainFactors:
    """The factors of one state and its branches.

    ``keep``: a, (N, 1) or (1, D); None where it is 1.
    ``write``: b of each branch, likewise.
    ``error``: ‖X' − (a X + Σ b F)‖ / ‖X'‖.
    ``known``: whether the error is that of rounding, so that the factors are those of the model.
    """

    keep: torch.Tensor | None
    write: tuple[torch.Tensor | None, ...]
    error: float
    known: bool = True


def plain_factors(
    before: torch.Tensor, branches: Sequence[torch.Tensor], after: torch.Tensor, precision: torch.dtype
) -> PlainFactors:
    """The simplest factors that give the next state: ones, one number for all tokens, a number a token, a number a feature.

    They are believed only where they give it to rounding, from many more equations than unknowns, and where the state and the
    branches are not parallel; otherwise nothing is known.
    """
    terms = torch.stack([before, *branches]).double()  # (1 + P, N, D)
    goal, limit = after.double(), tolerance(precision)
    ones = relative_error(goal - terms.sum(0), goal)

    def believed(found: torch.Tensor | None, error: float) -> bool:
        """Whether factors (1 + P, R), R rows of as many numbers, explain the next state and each branch's part in it."""
        if found is None or error > limit:
            return False
        sizes = torch.linalg.vector_norm(terms[1:].flatten(1), dim=1) * found[1:].square().mean(
            1
        ).sqrt().clamp_min(0.01)
        return error * float(goal.norm()) <= SHARE * float(sizes.min())

    # Of all numbers at once: the most equations, and the only case in which a factor may be called 1.
    found, error = _solved(terms.flatten(1)[:, None], goal.flatten()[None])
    near = found is not None and bool((found - 1).abs().max() <= ONE.get(precision, 1e-3))
    if near and believed(torch.ones(len(terms), 1), ones):
        return PlainFactors(None, (None,) * len(branches), ones)
    if found is not None and believed(found, error):
        return _factors(found[..., None].expand(-1, len(goal), 1), error)
    for axis in (0, 1):  # a number a token, then a number a feature
        found, error = _solved(terms if axis == 0 else terms.mT, goal if axis == 0 else goal.mT)
        if found is not None and believed(found, error):
            return _factors(found[..., None] if axis == 0 else found[:, None], error)
    return PlainFactors(None, (None,) * len(branches), ones, known=False)


def _factors(found: torch.Tensor, error: float) -> PlainFactors:
    keep, *write = found
    return PlainFactors(keep, tuple(write), error)


def _solved(terms: torch.Tensor, goal: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Factors (1 + P, R) of each row by least squares, and their relative error; None where they are not determined.

    ``terms`` are (1 + P, R, E) and ``goal`` is (R, E): R rows of E equations each.
    """
    unknowns, rows, equations = terms.shape
    if not rows or equations < EQUATIONS * unknowns:
        return None, float("inf")
    sizes = torch.linalg.vector_norm(terms, dim=-1)  # (1 + P, R)
    safe = sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    normed = terms / safe[..., None]
    gram = torch.einsum("pre,qre->rpq", normed, normed)
    right = torch.einsum("pre,re->rp", normed, goal)
    if not bool(torch.isfinite(gram).all()) or bool((torch.linalg.eigvalsh(gram)[:, 0] < INDEPENDENT).any()):
        return None, float("inf")
    found = torch.linalg.solve(gram, right).mT / safe
    return found, relative_error(goal - torch.einsum("pr,pre->re", found, terms), goal)
