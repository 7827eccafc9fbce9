"""What is stored of connections that are no streams? Factors of plain ones, weights over depth, and the coordinates of both.

Shapes: C connections, K sequences, T tokens, D features, S ≤ C + 1 sources (the embedding, then each sublayer's output).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from depthscope.diagnostics import schema
from depthscope.probes.connections.proof import relative_error, tolerance
from depthscope.probes.structure.chain import PLAIN, Connection

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


def factor_variables(
    residual: Sequence[torch.Tensor | None], branch: Sequence[torch.Tensor | None]
) -> Variables:
    """The factors a and b of plain connections X' = a X + b F.

    ``residual, branch``: one item a connection: (K, T), (K, T, D), or None for a factor of 1.
    Returns: ``residual_scale``, ``residual_gate``, ``branch_scale`` and ``branch_gate`` as (dims, array), those that
    are not 1 everywhere.
    """
    found: Variables = {}
    for name, factors in (("residual", residual), ("branch", branch)):
        for ending, axes in (("scale", 2), ("gate", 3)):
            of_axes = [
                f if f is not None and f.ndim == axes and bool((f != 1).any()) else None for f in factors
            ]
            known = next((factor for factor in of_axes if factor is not None), None)
            if known is not None:
                ones = torch.ones_like(known)
                array = torch.stack([ones if factor is None else factor for factor in of_axes]).numpy()
                found[f"{name}_{ending}"] = (schema.TRACE[f"{name}_{ending}"].dims, array)
    return found


def depth_variables(read: Sequence[torch.Tensor], carry: Sequence[torch.Tensor]) -> Variables:
    """How much each branch reads, and each next state keeps, of the sources: the embedding and every branch's output.

    ``read``: one item a connection, (K, T, V, S) with any S ≤ C + 1: sources that are left out at the end have the weight 0.
    ``carry``: the same without V.
    Returns: ``depth_read`` or, for several inputs V, ``depth_reads``; and ``depth_carry``, as (dims, array).
    """
    found: Variables = {}
    several = any(row.shape[-2] > 1 for row in read)
    reads = read if several else [row.squeeze(-2) for row in read]
    for name, rows in (("depth_reads" if several else "depth_read", reads), ("depth_carry", carry)):
        padded = np.zeros((len(rows), *rows[0].shape[:-1], len(rows) + 1), dtype=np.float32)
        for number, row in enumerate(rows):
            # Connection k comes after the embedding and k outputs.
            assert not bool(row[..., number + 1 :].nan_to_num().any()), (
                f"{name} {number} reads a later source"
            )
            kept = min(row.shape[-1], number + 1)
            padded[number, ..., :kept] = row[..., :kept].numpy()
            padded[number][np.isnan(padded[number, ..., 0])] = np.nan
        found[name] = (schema.TRACE[name].dims, padded)
    return found


def linear_coords(connections: Sequence[Connection], *, over_depth: bool = False) -> dict[str, Any]:
    """Coordinates of the connection axis that say more than where a connection is; those that are trivial are left out.

    ``over_depth``: whether the chain has variables of `depth_variables`, whose sources are then numbered.
    """
    coords: dict[str, Any] = {"source": np.arange(len(connections) + 1)} if over_depth else {}
    after = [each.style if each.style in PLAIN[1:] else "" for each in connections]
    if any(after):
        coords["after_sum"] = ("connection", np.array(after, dtype=object))
    return coords


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
        keep, *write = found[..., None].expand(-1, len(goal), 1)
        return PlainFactors(keep, tuple(write), error)
    for axis in (0, 1):  # a number a token, then a number a feature
        found, error = _solved(terms if axis == 0 else terms.mT, goal if axis == 0 else goal.mT)
        if found is not None and believed(found, error):
            keep, *write = found[..., None] if axis == 0 else found[:, None]
            return PlainFactors(keep, tuple(write), error)
    return PlainFactors(None, (None,) * len(branches), ones, known=False)


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
