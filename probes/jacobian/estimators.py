"""Numbers of a linear map from products alone: largest singular values, ‖J‖_F², the density of σ².

Every estimate carries its error, the seed of its probes and their number. Shapes: J is (out, in); K probes or steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from depthscope.diagnostics.errors import InputError

# A Krylov space is exhausted when its next vector is this many roundings of the map's size: what orthogonalisation leaves of
# a vector inside the space is a few of them. A heuristic.
EXHAUSTED = 10.0


class LinearMap(Protocol):
    """A linear map that is known by its products; `depthscope.probes.jacobian.operator.JacobianOperator` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the products are computed."""

    @property
    def device(self) -> torch.device:
        """Where the products are computed."""

    def matvec(self, vector: torch.Tensor, /) -> torch.Tensor:
        """J v in the dtype of v."""

    def rmatvec(self, vector: torch.Tensor, /) -> torch.Tensor:
        """Jᵀ u in the dtype of u."""


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes, with its standard error (NaN for one probe)."""

    value: float
    stderr: float
    probes: int
    seed: int


@dataclass(frozen=True)
class SingularValue:
    """A Ritz value after ``steps`` Lanczos steps: some σ is within ``error`` of it, and σ_max is not below it."""

    value: float
    error: float
    steps: int
    seed: int


@dataclass(frozen=True, eq=False)
class SingularValues:
    """The largest singular values, falling; some σ is within ``errors[i]`` of ``values[i]``."""

    values: np.ndarray
    errors: np.ndarray
    probes: int
    seed: int


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of σ² as weighted nodes, with its mean and variance (dynamical isometry: 1 and 0)."""

    nodes: np.ndarray
    weights: np.ndarray
    mean: Estimate
    variance: Estimate
    steps: int
    probes: int
    seed: int


def sigma_max(op: LinearMap, *, steps: int = 20, seed: int = 0) -> SingularValue:
    """Largest singular value, by Golub-Kahan-Lanczos bidiagonalisation from a random start.

    A V = U B and Aᵀ U = V Bᵀ + β v eᵀ with B upper bidiagonal. For a singular triple (p, θ, q) of B, A(Vq) = θ(Up) is
    exact and ‖Aᵀ(Up) − θ(Vq)‖ = β|p_K|: a singular value of A is within that residual of θ, and θ ≤ σ_max.

    Parameters
    ----------
    op : LinearMap
        J, (out, in).
    steps : int
        K, at most; each costs one product with J and one with Jᵀ.
    seed : int
        Seed of the start.

    Returns
    -------
    SingularValue
        Value, residual, steps made (fewer when the Krylov space is exhausted).

    Raises
    ------
    InputError
        For less than one step.

    Notes
    -----
    Golub and Kahan 1965; full reorthogonalisation in float64. The residual bounds the distance to *some* σ: a start that is
    nearly orthogonal to the top singular vector needs more steps, which a second seed shows.

    Examples
    --------
    >>> from depthscope.probes.jacobian.estimators import DenseMap
    >>> round(sigma_max(DenseMap([[3.0, 0.0], [0.0, 4.0]]), steps=2).value, 9)
    4.0
    """
    require_least("steps", steps, 1)
    bidiagonal, last = _golub_kahan(op, gaussian((op.shape[1],), seed, op), steps)
    left, values, _ = torch.linalg.svd(bidiagonal)
    return SingularValue(float(values[0]), float(last * left[-1, 0].abs()), len(bidiagonal), seed)


def top_singular_values(
    op: LinearMap, k: int, *, oversampling: int = 10, power: int = 2, seed: int = 0
) -> SingularValues:
    """The k largest singular values, by randomised range finding with power iterations.

    Q spans (J Jᵀ)^q J Ω for a Gaussian Ω of k + p columns, re-orthonormalised at every product; the singular values of
    Qᵀ J are those of J within its residual. Since Jᵀu_i = σ_i v_i is exact for u_i in the span of Q, the error given is
    ‖J v_i − σ_i u_i‖.

    Parameters
    ----------
    op : LinearMap
        J, (out, in).
    k : int
        How many values.
    oversampling : int
        p, extra columns.
    power : int
        q, power iterations.
    seed : int
        Seed of Ω.

    Returns
    -------
    SingularValues
        Falling. Costs (q + 1)(k + p) products with J, as many with Jᵀ, and k more.

    Raises
    ------
    InputError
        For a k outside 1 … min(in, out), or a negative p or q.

    Notes
    -----
    Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.

    Examples
    --------
    >>> from depthscope.probes.jacobian.estimators import DenseMap
    >>> top_singular_values(DenseMap([[3.0, 0.0], [0.0, 4.0]]), 2).values.round(9).tolist()
    [4.0, 3.0]
    """
    require_rank(k, op)
    require_least("oversampling", oversampling, 0)
    require_least("power", power, 0)
    width = min(k + oversampling, *op.shape)  # more columns than the rank would be linearly dependent
    basis = orthonormal(columns(op.matvec, gaussian((op.shape[1], width), seed, op)))
    # Orthonormal after every product: powers of J alone would lose the smaller σ to rounding.
    for _ in range(power):
        basis = orthonormal(columns(op.rmatvec, basis))
        basis = orthonormal(columns(op.matvec, basis))
    # JᵀQ = V Σ Wᵀ: its left vectors are right ones of J, and Q W are the left ones.
    right, values, left = torch.linalg.svd(columns(op.rmatvec, basis), full_matrices=False)
    top = basis @ left.mT[:, :k]
    residual = columns(op.matvec, right[:, :k]) - top * values[:k]
    return SingularValues(
        values[:k].cpu().numpy(), torch.linalg.vector_norm(residual, dim=0).cpu().numpy(), width, seed
    )


def squared_frobenius(op: LinearMap, *, probes: int = 32, seed: int = 0) -> Estimate:
    """‖J‖_F² = Σ σ², by Hutchinson's estimator.

    E‖Jᵀz‖² = E zᵀJJᵀz = tr(JJᵀ · E zzᵀ) = tr JJᵀ = ‖J‖_F² for independent signs z (E zzᵀ = I), so every probe is unbiased.
    Divided by in, it is the mean of σ²; divided by out, the mean squared gradient gain.

    Parameters
    ----------
    op : LinearMap
        J, (out, in).
    probes : int
        Number of z; each costs one product with Jᵀ, none with J.
    seed : int
        Seed of the signs.

    Returns
    -------
    Estimate

    Raises
    ------
    InputError
        For less than one probe.

    Notes
    -----
    Hutchinson 1989. Variance per probe: 2 Σ_{i≠j} (JJᵀ)²_ij, zero for orthogonal rows.

    Examples
    --------
    >>> from depthscope.probes.jacobian.estimators import DenseMap
    >>> squared_frobenius(DenseMap([[3.0, 0.0], [0.0, 4.0]]), probes=2)
    Estimate(value=25.0, stderr=0.0, probes=2, seed=0)
    """
    require_least("probes", probes, 1)
    signs = _random_signs((probes, op.shape[0]), seed, op)
    return _mean_estimate(torch.stack([op.rmatvec(z).square().sum() for z in signs]), seed)


def spectral_density(op: LinearMap, *, steps: int = 20, probes: int = 8, seed: int = 0) -> SpectralDensity:
    """Density of σ² over the in directions, by stochastic Lanczos quadrature; its mean and variance.

    For a unit probe z, zᵀ f(JᵀJ) z = Σ_k w_k f(θ_k) with the Ritz values θ_k and squared first components w_k of K Lanczos
    steps, exact for polynomials of degree < 2K. E zᵀ f(JᵀJ) z = tr f(JᵀJ) / in for signs z, so the averaged quadrature is
    the density's, unbiased for all moments below 2K. The first two, ‖Jz‖² and ‖JᵀJz‖², give the mean and the variance
    m₂ − m₁² + s²/P, where s²/P, the variance of the averaged m₁, takes away the bias of m₁².

    Parameters
    ----------
    op : LinearMap
        J, (out, in); where out < in the density has in − out zeros.
    steps : int
        K ≥ 2, at most in.
    probes : int
        P; each costs K products with J and K with Jᵀ.
    seed : int
        Seed of the signs.

    Returns
    -------
    SpectralDensity
        ``nodes`` and ``weights`` (P·K,), the weights summing to 1. The variance's standard error is a jackknife over probes.

    Raises
    ------
    InputError
        For less than two steps or one probe.

    Notes
    -----
    Ubaru, Chen and Saad 2017; dynamical isometry after Pennington, Schoenholz and Ganguli 2017 (arXiv 1711.04735).

    Examples
    --------
    >>> from depthscope.probes.jacobian.estimators import DenseMap
    >>> density = spectral_density(DenseMap([[3.0, 0.0], [0.0, 4.0]]), steps=2, probes=2)
    >>> round(density.mean.value, 9), round(density.variance.value, 9)
    (12.5, 12.25)
    """
    require_least("steps", steps, 2)
    require_least("probes", probes, 1)
    nodes, weights = [], []
    for z in _random_signs((probes, op.shape[1]), seed, op):
        # BᵀB of the bidiagonal matrix is the Lanczos matrix of JᵀJ: its eigenvalues are σ², without squaring the condition
        _, values, right = torch.linalg.svd(_golub_kahan(op, z, min(steps, op.shape[1]))[0])
        nodes.append(values.square())
        weights.append(right[:, 0].square())
    first = torch.stack([(w * x).sum() for x, w in zip(nodes, weights, strict=True)])
    second = torch.stack([(w * x.square()).sum() for x, w in zip(nodes, weights, strict=True)])
    return SpectralDensity(
        nodes=torch.cat(nodes).cpu().numpy(),
        weights=torch.cat(weights).cpu().numpy() / probes,
        mean=_mean_estimate(first, seed),
        variance=_variance_estimate(first, second, seed),
        steps=steps,
        probes=probes,
        seed=seed,
    )


class DenseMap:
    """A known matrix as a `LinearMap`.

    ``matrix``: (out, in), real.
    """

    def __init__(self, matrix: Any):
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self.shape = (self.matrix.shape[0], self.matrix.shape[1])
        self.dtype = self.matrix.dtype
        self.device = self.matrix.device

    def matvec(self, vector: torch.Tensor, /) -> torch.Tensor:
        """J v."""
        return self.matrix @ vector

    def rmatvec(self, vector: torch.Tensor, /) -> torch.Tensor:
        """Jᵀ u."""
        return self.matrix.mT @ vector


def _golub_kahan(op: LinearMap, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper bidiagonal B of at most ``steps`` rows, and the coefficient β that leads out of its space."""
    rights = [start / torch.linalg.vector_norm(start)]
    # All vectors are stored and orthogonalised against: without it Lanczos finds the largest values again and again.
    lefts: list[torch.Tensor] = []
    diagonal: list[torch.Tensor] = []
    above: list[torch.Tensor] = []
    floor = EXHAUSTED * torch.finfo(op.dtype).eps
    while True:
        left, alpha = _next_direction(op.matvec(rights[-1]), lefts, floor)
        lefts.append(left)
        diagonal.append(alpha)
        right, beta = _next_direction(op.rmatvec(left), rights, floor)
        # The last column is not needed, but its length β is: it bounds the error of the values.
        if not right.any() or len(diagonal) == min(steps, op.shape[1]):
            matrix = torch.diag(torch.stack(diagonal))
            return matrix + torch.diag(torch.stack(above), 1) if above else matrix, beta
        rights.append(right)
        above.append(beta)


def _next_direction(
    vector: torch.Tensor, basis: list[torch.Tensor], floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a vector orthogonal to a basis: its direction, zero where that is rounding only, and its length."""
    size = torch.linalg.vector_norm(vector)
    if basis:
        known = torch.stack(basis)
        # twice is enough (Kahan and Parlett): once leaves a remainder of the size of the rounding over the length
        for _ in range(2):
            vector = vector - known.mT @ (known @ vector)
    length = torch.linalg.vector_norm(vector)
    # Rounding alone has a direction too, which would add a singular value that the map does not have.
    return (vector / length if length > floor * size else torch.zeros_like(vector)), length


def columns(product: Any, matrix: torch.Tensor) -> torch.Tensor:
    """Apply a product to every column of a matrix."""
    return torch.stack([product(column) for column in matrix.unbind(1)], dim=1)


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of a matrix's columns, by QR."""
    return torch.linalg.qr(matrix).Q


def gaussian(shape: tuple[int, ...], seed: int, op: LinearMap) -> torch.Tensor:
    """Standard normal float64 probes on the map's device."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same everywhere
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(op.device)


def _random_signs(shape: tuple[int, ...], seed: int, op: LinearMap) -> torch.Tensor:
    """Independent ±1 (Rademacher) probes, whose variance is the smallest among unbiased ones."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(op.device, torch.float64)


def _mean_estimate(samples: torch.Tensor, seed: int) -> Estimate:
    count = len(samples)
    stderr = float(samples.std() / count**0.5) if count > 1 else float("nan")
    return Estimate(float(samples.mean()), stderr, count, seed)


def _variance_estimate(first: torch.Tensor, second: torch.Tensor, seed: int) -> Estimate:
    """Var σ² from moments per probe; its standard error by leaving out one probe at a time."""
    count = len(first)
    if count == 1:
        return Estimate(float(second[0] - first[0] ** 2), float("nan"), 1, seed)
    value = _unbiased_variance(first, second)
    if count == 2:  # without one of two probes one is left, which has no variance
        return Estimate(float(value), float("nan"), count, seed)
    keep = ~torch.eye(count, dtype=torch.bool)
    left_out = torch.stack([_unbiased_variance(first[row], second[row]) for row in keep.to(first.device)])
    # The jackknife's variance, (P − 1)/P Σ (x_p − mean)².
    stderr = ((count - 1) * left_out.var(correction=0)).sqrt()
    return Estimate(float(value), float(stderr), count, seed)


def _unbiased_variance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return second.mean() - first.mean().square() + first.var() / len(first)


def require_least(name: str, count: int, least: int) -> None:
    """Refuse a count below the least that makes sense."""
    if count < least:
        raise InputError(f"got {name} = {count}; expected at least {least}")


def require_rank(k: int, op: LinearMap) -> None:
    """Refuse more values than the map has."""
    if not 1 <= k <= min(op.shape):
        raise InputError(
            f"got k = {k} for a map of shape {op.shape}; expected 1 … {min(op.shape)}: ask for fewer singular values"
        )
