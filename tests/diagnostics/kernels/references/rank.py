"""Ranks by scipy, numpy, scikit-learn, scikit-dimension and the authors of the corrected participation ratio."""

from operator import attrgetter

import dimensionality
import numpy as np
import scipy
import skdim
from scipy import integrate, stats
from sklearn.decomposition import PCA

from depthscope.diagnostics.kernels import rank
from tests.diagnostics.kernels.references.reference import FEW, SPECTRA, STATES, Reference

MATRICES = STATES + FEW
RANKS = attrgetter("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


def energies(x):
    """Eigenvalues of the d × d matrix of products, rounding cut off."""
    return np.clip(scipy.linalg.eigvalsh(x.T @ x), 0, None)


def residual(x):
    centred = x - x.mean(axis=0)
    over, under = (np.linalg.norm(m, 1) * np.linalg.norm(m, np.inf) for m in (centred, x))
    return np.sqrt(over / under)


def corrected(key):
    return lambda x: dimensionality.participation_ratio(x, return_all=True)[key]


def law(n, d):
    """The textbook density over the eigenvalues of ratio γ, integrated."""
    few, gamma = min(n, d), min(n, d) / max(n, d)
    low, high = (1 - gamma**0.5) ** 2, (1 + gamma**0.5) ** 2

    def mean(f):
        weight = {"weight": "alg", "wvar": (0.5, 0.5)}  # √((λ − low)(high − λ))
        return integrate.quad(lambda e: f(e) / (2 * np.pi * gamma * e), low, high, **weight)[0]

    size = mean(np.sqrt)
    entropy = -mean(lambda e: np.sqrt(e) / size * np.log(np.sqrt(e) / size))
    energy_entropy = -mean(lambda e: e * np.log(e))
    return (
        few * np.exp(entropy),
        few * np.exp(energy_entropy),
        few / mean(lambda e: e * e),
        few / high,
    )


REFERENCES: dict[str, tuple[Reference, ...]] = {
    "rank.singular_values": (
        Reference("scipy.linalg.svdvals", rank.singular_values, scipy.linalg.svdvals, MATRICES),
    ),
    "rank.effective_rank": (
        Reference(
            "scipy.stats.entropy of scipy.linalg.svdvals",
            rank.effective_rank,
            lambda x: np.exp(stats.entropy(scipy.linalg.svdvals(x))),
            MATRICES,
        ),
    ),
    "rank.effective_rank_of": (
        Reference("scipy.stats.entropy", rank.effective_rank_of, lambda s: np.exp(stats.entropy(s)), SPECTRA),
    ),
    "rank.entropy_rank": (
        Reference(
            "scipy.stats.entropy of scipy.linalg.eigvalsh",
            rank.entropy_rank,
            lambda x: np.exp(stats.entropy(energies(x))),
            MATRICES,
        ),
    ),
    "rank.entropy_rank_of": (
        Reference(
            "scipy.stats.entropy", rank.entropy_rank_of, lambda s: np.exp(stats.entropy(s**2)), SPECTRA
        ),
    ),
    "rank.participation_ratio": (
        Reference(
            "skdim.id.lPCA(ver='participation_ratio')",
            lambda x: rank.participation_ratio(x, center=True),
            lambda x: skdim.id.lPCA(ver="participation_ratio").fit(x).dimension_,
            MATRICES,
        ),
        *(
            Reference(
                f"dimensionality.participation_ratio, {key}",
                lambda x, correct=correct: rank.participation_ratio(x, center=True, correct=correct),
                corrected(key),
                MATRICES,
                rtol=1e-8,
            )
            for correct, key in ((None, "naive"), ("rows", "row"), ("both", "both"))
        ),
    ),
    "rank.participation_ratio_of": (
        Reference(
            "the inverse of Simpson's index",
            rank.participation_ratio_of,
            lambda s: 1 / np.sum((s**2 / np.sum(s**2)) ** 2),
            SPECTRA,
        ),
    ),
    "rank.stable_rank": (
        Reference(
            "numpy.linalg.norm",
            rank.stable_rank,
            lambda x: (np.linalg.norm(x, "fro") / np.linalg.norm(x, 2)) ** 2,
            MATRICES,
        ),
    ),
    "rank.stable_rank_of": (
        Reference(
            "numpy.linalg.norm",
            rank.stable_rank_of,
            lambda s: (np.linalg.norm(np.diag(s), "fro") / np.linalg.norm(np.diag(s), 2)) ** 2,
            SPECTRA,
        ),
    ),
    "rank.numerical_rank": (
        Reference("numpy.linalg.matrix_rank", rank.numerical_rank, np.linalg.matrix_rank, MATRICES),
    ),
    "rank.numerical_rank_of": (
        Reference(
            "numpy.linalg.matrix_rank",
            lambda s: rank.numerical_rank_of(s, rtol=0.01),
            lambda s: np.linalg.matrix_rank(np.diag(s), rtol=0.01),
            SPECTRA,
        ),
    ),
    "rank.condition_of": (
        Reference("numpy.linalg.cond", rank.condition_of, lambda s: np.linalg.cond(np.diag(s)), SPECTRA),
    ),
    "rank.top_energy": (
        Reference(
            "sklearn.decomposition.PCA",
            lambda x: rank.top_energy(x, 4, center=True),
            lambda x: PCA(4, svd_solver="full").fit(x).explained_variance_ratio_.sum(),
            MATRICES,
        ),
    ),
    "rank.top_energy_of": (
        Reference(
            "numpy.partition",
            lambda s: rank.top_energy_of(s, 2),
            lambda s: np.sum(np.partition(s, -2)[-2:] ** 2) / np.sum(s**2),
            SPECTRA,
        ),
    ),
    "rank.dong_residual": (Reference("numpy.linalg.norm", rank.dong_residual, residual, MATRICES),),
    "rank.marchenko_pastur": (
        Reference(
            "scipy.integrate.quad of the textbook density",
            lambda n, d: RANKS(rank.marchenko_pastur(n, d)),
            law,
            [(400, 100), (100, 400), (64, 48), (500, 3)],
            rtol=1e-8,
        ),
    ),
}
