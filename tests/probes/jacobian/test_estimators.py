"""Every estimator converges to the exact number, stays within its own error, and is unbiased where it says so."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from depthscope.probes.jacobian.estimators import (
    DenseMap,
    sigma_max,
    spectral_density,
    squared_frobenius,
    top_singular_values,
)
from depthscope.probes.jacobian.lyapunov import lyapunov_exponents, lyapunov_spectrum
from depthscope.probes.jacobian.operator import jacobian


def matrix(out: int = 40, into: int = 30, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, into, generator=generator, dtype=torch.float64) / math.sqrt(into)


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(matrix(size, size, seed=seed)).Q


SHAPES = [(40, 30), (30, 40), (35, 35)]


@dataclasses.dataclass(frozen=True)
class Case:
    """An estimator, the exact number that it is for, and its effort from little to enough."""

    estimate: object
    exact: object
    efforts: tuple[int, int]


CASES = {
    "sigma_max": Case(
        lambda op, effort, seed: sigma_max(op, steps=effort, seed=seed),
        lambda a: float(torch.linalg.matrix_norm(a, 2)),
        (4, 30),
    ),
    "top_singular_values": Case(
        lambda op, effort, seed: SimpleNamespace(
            value=top_singular_values(op, 3, oversampling=2, power=effort, seed=seed).values[2]
        ),
        lambda a: float(torch.linalg.svdvals(a)[2]),
        (0, 40),
    ),
    "squared_frobenius": Case(
        lambda op, effort, seed: squared_frobenius(op, probes=effort, seed=seed),
        lambda a: float(a.square().sum()),
        (4, 4000),
    ),
    "spectral_mean": Case(
        lambda op, effort, seed: spectral_density(op, steps=2, probes=effort, seed=seed).mean,
        lambda a: float(a.square().sum() / a.shape[1]),
        (4, 1000),
    ),
    "spectral_variance": Case(
        lambda op, effort, seed: spectral_density(op, steps=3, probes=effort, seed=seed).variance,
        lambda a: float(torch.linalg.eigvalsh(a.mT @ a).var(correction=0)),
        (4, 1000),
    ),
    "lyapunov": Case(
        lambda op, effort, seed: SimpleNamespace(
            value=lyapunov_exponents([op], 2, sweeps=effort, seed=seed).exponents[0]
        ),
        lambda a: float(torch.linalg.matrix_norm(a, 2).log()),
        (1, 60),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_it_converges(name, shape):
    case, a = CASES[name], matrix(*shape)
    exact = case.exact(a)
    errors = [
        np.mean([abs(case.estimate(DenseMap(a), effort, seed).value - exact) for seed in range(4)])
        for effort in case.efforts
    ]
    assert errors[1] < 0.03 * abs(exact)
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("name", ["squared_frobenius", "spectral_mean", "spectral_variance"])
def test_it_is_unbiased_and_its_standard_error_is_that_of_repetition(name):
    case, a = CASES[name], matrix(12, 10)
    found = [case.estimate(DenseMap(a), 12, seed) for seed in range(400)]
    values = np.array([estimate.value for estimate in found])
    spread = values.std(ddof=1)
    assert abs(values.mean() - case.exact(a)) < 4 * spread / math.sqrt(len(values))
    stderr = math.sqrt(np.mean([estimate.stderr**2 for estimate in found]))
    assert stderr == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("name", CASES)
def test_a_seed_fixes_it_and_the_users_random_state_is_left_alone(name):
    case, op = CASES[name], DenseMap(matrix())
    state = torch.get_rng_state()
    one, same, other = (case.estimate(op, case.efforts[0] or 1, seed).value for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == same != other


# --- the largest singular values ---


@pytest.mark.parametrize("steps", [1, 3, 6, 12])
def test_a_ritz_value_is_a_lower_bound_with_its_residual(steps):
    a = matrix()
    values = torch.linalg.svdvals(a).numpy()
    for seed in range(5):
        found = sigma_max(DenseMap(a), steps=steps, seed=seed)
        assert found.steps == steps
        assert found.value <= values[0] + 1e-12
        assert np.abs(values - found.value).min() <= found.error + 1e-12


def test_lanczos_stops_when_nothing_is_left():
    rank_two = torch.outer(matrix()[:, 0], matrix()[0]) + torch.outer(matrix()[:, 1], matrix()[1])
    found = sigma_max(DenseMap(rank_two), steps=20)
    assert found.steps <= 3
    assert found.value == pytest.approx(float(torch.linalg.matrix_norm(rank_two, 2)), rel=1e-10)
    assert found.error < 1e-10
    repeated = sigma_max(DenseMap(3.0 * orthogonal(20)), steps=20)
    assert (repeated.steps, repeated.value) == (1, pytest.approx(3.0))
    nothing = sigma_max(DenseMap(torch.zeros(4, 5)))
    assert (nothing.value, nothing.error) == (0.0, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_randomised_values_are_exact_once_the_basis_is_full(shape):
    a = matrix(*shape)
    found = top_singular_values(DenseMap(a), 30, oversampling=10, power=0)
    np.testing.assert_allclose(found.values, torch.linalg.svdvals(a)[:30].numpy(), rtol=1e-9)
    assert found.errors.max() < 1e-9
    assert found.probes == min(shape[0], shape[1], 40)


def test_randomised_values_say_how_wrong_they_are():
    a = matrix()
    exact = torch.linalg.svdvals(a).numpy()
    found = top_singular_values(DenseMap(a), 4, oversampling=2, power=1)
    assert np.all(np.diff(found.values) <= 0)
    assert np.all(found.values <= exact[:4] + 1e-12)
    assert all(
        np.abs(exact - value).min() <= error for value, error in zip(found.values, found.errors, strict=True)
    )


# --- σ² ---


def test_orthogonal_rows_leave_hutchinson_no_variance():
    found = squared_frobenius(DenseMap(orthogonal(16)), probes=3)
    assert found.value == pytest.approx(16.0)
    assert found.stderr < 1e-12
    assert math.isnan(squared_frobenius(DenseMap(orthogonal(16)), probes=1).stderr)


def test_an_isometry_has_mean_one_and_variance_zero():
    density = spectral_density(DenseMap(orthogonal(16)), steps=10, probes=4)
    np.testing.assert_allclose(density.nodes, 1.0)
    assert density.weights.sum() == pytest.approx(1.0)
    assert density.mean.value == pytest.approx(1.0)
    assert density.variance.value == pytest.approx(0.0, abs=1e-12)


def test_the_quadrature_is_exact_below_twice_its_steps():
    a, steps, probes = matrix(), 4, 3
    density = spectral_density(DenseMap(a), steps=steps, probes=probes, seed=5)
    signs = torch.randint(0, 2, (probes, 30), generator=torch.Generator().manual_seed(5)).double() * 2 - 1
    for power in range(2 * steps):
        product = torch.linalg.matrix_power(a.mT @ a, power)
        exact = torch.einsum("pi,ij,pj->p", signs, product, signs).mean() / 30
        assert (density.weights * density.nodes**power).sum() == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_density_is_distributed_as_the_spectrum(shape):
    a = matrix(*shape)
    exact = torch.linalg.eigvalsh(a.mT @ a).numpy()
    density = spectral_density(DenseMap(a), steps=12, probes=200)
    assert density.weights.sum() == pytest.approx(1.0)
    levels = np.quantile(exact, [0.25, 0.5, 0.75, 0.9])
    below = [density.weights[density.nodes <= level].sum() for level in levels]
    np.testing.assert_allclose(below, [(exact <= level).mean() for level in levels], atol=0.08)


def test_lost_directions_are_zeros_of_the_density():
    density = spectral_density(DenseMap(matrix(30, 40)), steps=40, probes=100)
    assert density.weights[density.nodes < 1e-9].sum() == pytest.approx(0.25, abs=0.03)


def test_the_variance_is_unbiased_with_two_probes():
    """σ² = 4, 0, 0, 0 has variance 3; without the correction for the spread of the mean it would come out as 2.25."""
    op = DenseMap(torch.ones(1, 4))
    values = np.array(
        [spectral_density(op, steps=2, probes=2, seed=seed).variance.value for seed in range(600)]
    )
    assert values.mean() == pytest.approx(3.0, abs=0.45)


def test_few_probes_have_no_standard_error_of_the_variance():
    assert math.isnan(spectral_density(DenseMap(matrix()), probes=1).variance.stderr)
    assert math.isnan(spectral_density(DenseMap(matrix()), probes=2).variance.stderr)
    assert spectral_density(DenseMap(matrix()), probes=3).variance.stderr > 0


# --- Lyapunov exponents ---


def test_exponents_are_the_logarithms_of_the_products_singular_values():
    maps = [matrix(8, 8, seed=seed) for seed in range(4)]
    product = maps[3] @ maps[2] @ maps[1] @ maps[0]
    found = lyapunov_exponents([DenseMap(a) for a in maps], 8, sweeps=40)
    np.testing.assert_allclose(found.exponents, torch.linalg.svdvals(product).log().numpy() / 4, atol=1e-6)
    assert found.errors.max() < 1e-5
    assert found.increments.shape == (4, 8)
    determinants = [torch.linalg.slogdet(a).logabsdet for a in maps]
    np.testing.assert_allclose(
        found.increments.sum(1), determinants, rtol=1e-9
    )  # |det| by block, in any basis


def test_a_thousand_maps_neither_overflow_nor_vanish():
    found = lyapunov_exponents([DenseMap(torch.diag(torch.tensor([1e3, 1e-3])))] * 1000, 2, sweeps=2)
    np.testing.assert_allclose(found.exponents, [math.log(1e3), -math.log(1e3)], atol=1e-2)


def test_a_lost_rank_is_minus_infinity_and_one_sweep_has_no_error():
    found = lyapunov_exponents([DenseMap([[1.0, 0.0], [0.0, 0.0]])] * 2, 2, sweeps=1)
    assert found.exponents[1] < -30
    assert np.isnan(found.errors).all()


def test_rectangular_maps_chain():
    maps = [matrix(6, 9, seed=1), matrix(7, 6, seed=2)]
    found = lyapunov_exponents([DenseMap(a) for a in maps], 3, sweeps=60)
    expected = torch.linalg.svdvals(maps[1] @ maps[0]).log()[:3] / 2
    np.testing.assert_allclose(found.exponents, expected, atol=1e-5)


# --- on a model ---


def dense(op) -> torch.Tensor:
    return torch.stack([op.rmatvec(u) for u in torch.eye(op.shape[0], dtype=torch.float64)])


@pytest.fixture(scope="module")
def llama_jacobian(models, ids):
    op = jacobian(models["llama"](), ids[:1, :4], start=1, tokens="all")
    return op, dense(op)


def test_all_of_them_on_a_transformer(llama_jacobian):
    op, a = llama_jacobian
    values = torch.linalg.svdvals(a).numpy()
    assert sigma_max(op, steps=25).value == pytest.approx(values[0], rel=1e-3)
    top = top_singular_values(op, 3, power=6)
    np.testing.assert_allclose(top.values, values[:3], rtol=2e-2)
    frobenius = squared_frobenius(op, probes=64)
    assert abs(frobenius.value - (values**2).sum()) < 5 * frobenius.stderr
    density = spectral_density(op, steps=6, probes=16)
    assert abs(density.mean.value - (values**2).mean()) < 5 * density.mean.stderr
    assert abs(density.variance.value - (values**2).var()) < 5 * density.variance.stderr


def test_the_spectrum_of_a_chain_is_that_of_its_end_to_end_jacobian(models, ids):
    model = models["llama"]().double()
    found = lyapunov_spectrum(model, ids[:1, :4], 2, sweeps=12)
    exact = torch.linalg.svdvals(dense(jacobian(model, ids[:1, :4], tokens="all"))).log().numpy()[:2] / 3
    np.testing.assert_allclose(found.exponents, exact, atol=2e-3)
    assert found.increments.shape == (3, 2)


def test_orthogonal_blocks_are_an_isometry_of_the_chain():
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
    with torch.no_grad():
        for seed, layer in enumerate(model):
            layer.weight.copy_(orthogonal(6, seed))
    batch = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op = jacobian(model, batch)
    assert sigma_max(op).value == pytest.approx(1.0)
    assert squared_frobenius(op, probes=2).value == pytest.approx(op.shape[1])
    density = spectral_density(op, probes=2)
    assert (density.mean.value, density.variance.value) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    np.testing.assert_allclose(lyapunov_spectrum(model, batch, 3).exponents, 0.0, atol=1e-12)


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: sigma_max(op, steps=0), "got steps = 0; expected at least 1"),
        (lambda op: top_singular_values(op, 0), r"got k = 0 for a map of shape \(40, 30\); expected 1 … 30"),
        (lambda op: top_singular_values(op, 31), "ask for fewer"),
        (lambda op: top_singular_values(op, 2, power=-1), "power = -1"),
        (lambda op: squared_frobenius(op, probes=0), "probes = 0"),
        (lambda op: spectral_density(op, steps=1), "got steps = 1; expected at least 2"),
        (lambda op: lyapunov_exponents([], 1), "blocks = 0"),
        (lambda op: lyapunov_exponents([op], 2, sweeps=0), "sweeps = 0"),
        (lambda op: lyapunov_exponents([op, op], 2), "map 0 gives 40 entries and map 1 takes 30"),
    ],
)
def test_what_cannot_be_estimated(call, message):
    with pytest.raises(ValueError, match=message):
        call(DenseMap(matrix()))
