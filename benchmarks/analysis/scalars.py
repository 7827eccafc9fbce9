"""How fast and accurate are scalars that a peer computes too? Participation ratio, Procrustes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.analysis.comparison import Comparison, Step, Tool, relative
from depthscope.diagnostics.kernels import rank, similarity

Pair = tuple[np.ndarray, np.ndarray]


def points(tokens: int, *, width: int = 256, dimension: int = 12) -> np.ndarray:
    """A curved cloud of a few dimensions in many, float64."""
    rng = np.random.default_rng(0)
    # A known dimension, with noise that makes all rows distinct.
    hidden = rng.standard_normal((tokens, dimension))
    return np.tanh(hidden @ rng.standard_normal((dimension, width)) / 4) + 0.01 * rng.standard_normal(
        (tokens, width)
    )


def pair(tokens: int, *, width: int = 256) -> Pair:
    """Two states that share a part."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((tokens, width))
    return shared, shared @ rng.standard_normal((width, width)) / 16 + rng.standard_normal((tokens, width))


# --- participation ratio, corrected for the finite sample ---


def dimensionality(x: np.ndarray) -> Step:
    from dimensionality import participation_ratio

    return partial(participation_ratio, x)


def own_participation(x: np.ndarray) -> Step:
    return partial(rank.participation_ratio, x, center=True, correct="both")


def true_participation(x: np.ndarray) -> np.ndarray:
    """The ratio of U-statistics of Chun et al. over distinct rows and columns: all columns less equal ones."""
    all_columns = u_statistics(x @ x.T)
    over, under = all_columns - sum(u_statistics(np.outer(column, column)) for column in x.T)
    return over / under


def u_statistics(gram: np.ndarray) -> np.ndarray:
    """Estimates of (tr K)² and of ‖K‖² of the centred kernel, from sums over distinct rows."""
    n = len(gram)
    diagonal = np.diagonal(gram).copy()
    # Sums over two, three and four distinct indices from row sums and squares of the matrix off its diagonal.
    off = gram - np.diag(diagonal)
    sums, square = off.sum(0), (off**2).sum()
    total = sums.sum()
    link = (total**2 - 4 * (sums**2).sum() + 2 * square) / (n * (n - 1) * (n - 2) * (n - 3))
    twice = diagonal.sum() ** 2 - (diagonal**2).sum()
    three = n * (n - 1) * (n - 2)
    over = twice / (n * (n - 1)) - 2 * (diagonal * (total - 2 * sums)).sum() / three + link
    under = square / (n * (n - 1)) - 2 * ((sums**2).sum() - square) / three + link
    return np.array([over, under])


# --- Procrustes ---


def netrep(states: Pair) -> Step:
    from netrep.metrics import LinearMetric

    return lambda: LinearMetric(alpha=1.0).fit_score(*states)


def scipy_procrustes(states: Pair) -> Step:
    from scipy.linalg import orthogonal_procrustes

    def step() -> float:
        sides = [state - state.mean(0) for state in states]
        left, right = (side / np.linalg.norm(side) for side in sides)
        # Rounding can lift the cosine above 1.
        return np.arccos(min(orthogonal_procrustes(left, right)[1], 1.0))

    return step


def true_angle(states: Pair) -> np.ndarray:
    left, right = ((state - state.mean(0)) for state in states)
    nuclear = np.linalg.svd(left.T @ right, compute_uv=False).sum()
    return np.arccos(nuclear / (np.linalg.norm(left) * np.linalg.norm(right)))


OWN = "depthscope, numpy"


def comparisons(quick: bool) -> dict[str, Comparison]:
    """One comparison for each quantity."""
    count = 200 if quick else 1000
    size = f"{count} × 256"
    of_points: dict[str, Any] = {
        "baseline": OWN,
        "sizes": {size: partial(points, count)},
        "variants": {"200 × 256": partial(points, 200)},
        "error": relative,
    }
    of_pairs = of_points | {
        "sizes": {size: partial(pair, count)},
        "variants": {"200 × 256": partial(pair, 200)},
    }
    return {
        "participation ratio": Comparison(
            title="Participation ratio, corrected for the sample of tokens and of features",
            tools={
                OWN: Tool(own_participation),
                "dimensionality": Tool(dimensionality, package="dimensionality"),
            },
            truths={"": true_participation},
            **of_points,
        ),
        "Procrustes": Comparison(
            title="Procrustes angle",
            tools={
                OWN: Tool(lambda states: partial(similarity.procrustes, *states)),
                "scipy orthogonal_procrustes": Tool(scipy_procrustes),
                "netrep LinearMetric": Tool(netrep, package="netrep"),
            },
            truths={"": true_angle},
            **of_pairs,
        ),
    }
