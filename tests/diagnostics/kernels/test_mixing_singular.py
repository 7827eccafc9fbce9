"""Singular values and radii of many small matrices against LAPACK, mpmath and closed forms, on every kind of matrix."""

import mpmath
import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import mixing

COUNT = 600


def with_spectrum(rng, n, *values):
    left, right = (np.linalg.qr(rng.normal(size=(COUNT, n, n)))[0] for _ in range(2))
    return (left * np.resize(values, n)) @ right


def scaled(rng, n, spread):
    """Columns and rows of very different sizes."""
    sides = (10.0 ** rng.uniform(-spread, 0, size=(COUNT, *shape)) for shape in ((1, n), (n, 1)))
    return rng.normal(size=(COUNT, n, n)) * next(sides) * next(sides)


KINDS = {
    "free": lambda rng, n: rng.normal(size=(COUNT, n, n)),
    "identity": lambda rng, n: np.tile(np.eye(n), (COUNT, 1, 1)),
    "permutation": lambda rng, n: np.stack([np.eye(n)[rng.permutation(n)] for _ in range(COUNT)]),
    "uniform": lambda rng, n: np.full((COUNT, n, n), 1 / n),
    "near identity": lambda rng, n: np.eye(n) + 1e-8 * rng.normal(size=(COUNT, n, n)),
    "at rounding of the identity": lambda rng, n: np.eye(n) + 1e-15 * rng.normal(size=(COUNT, n, n)),
    "near uniform": lambda rng, n: 1 / n + 1e-8 * rng.normal(size=(COUNT, n, n)),
    "doubly stochastic": lambda rng, n: mixing.sinkhorn(3 * rng.normal(size=(COUNT, n, n))),
    "mHC at its start": lambda rng, n: mixing.sinkhorn(8 * np.eye(n) + 0.1 * rng.normal(size=(COUNT, n, n))),
    "HC": lambda rng, n: np.eye(n) + rng.normal(size=(COUNT, n, n)) * 10 ** rng.uniform(-1, 3, (COUNT, 1, 1)),
    "rank one": lambda rng, n: rng.normal(size=(COUNT, n, 1)) * rng.normal(size=(COUNT, 1, n)),
    "zero": lambda rng, n: np.zeros((COUNT, n, n)),
    "tiny": lambda rng, n: 1e-300 * rng.normal(size=(COUNT, n, n)),
    "huge": lambda rng, n: 1e300 * rng.normal(size=(COUNT, n, n)),
    "scaled": lambda rng, n: scaled(rng, n, 6),
    "orthogonal": lambda rng, n: with_spectrum(rng, n, 1),
    "twice double": lambda rng, n: with_spectrum(rng, n, 1, 1, 1e-3, 1e-3),
    "triple": lambda rng, n: with_spectrum(rng, n, 1, 1e-3, 1e-3, 1e-3),
    "nearly triple": lambda rng, n: with_spectrum(rng, n, 3, 1, 1 + 1e-5, 1 - 1e-5),
    "falling": lambda rng, n: with_spectrum(rng, n, 1, 1e-4, 1e-8, 1e-12),
    "nilpotent": lambda rng, n: np.triu(rng.normal(size=(COUNT, n, n)), 1),
    "integers": lambda rng, n: rng.integers(-1, 2, size=(COUNT, n, n)).astype(float),
}


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_singular_values_of_every_kind(array, rng, kind, n):
    p = KINDS[kind](rng, n)
    expected = np.linalg.svd(p, compute_uv=False)
    got = np.asarray(mixing.singular_values(array(p)))
    assert (np.abs(got - expected) <= 1e-14 * expected[:, :1]).all()
    assert (np.diff(got, axis=-1) <= 0).all()


def test_singular_values_to_more_digits_than_a_float_has(rng):
    p = np.concatenate([KINDS[kind](rng, 4)[:3] for kind in ("free", "near uniform", "falling", "triple")])
    got = mixing.singular_values(np.tile(p, (100, 1, 1)))[: len(p)]
    with mpmath.workdps(40):
        for matrix, values in zip(p, got, strict=True):
            exact = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)
            assert max(abs(float(e - v)) for e, v in zip(exact, values, strict=True)) < 4e-15 * float(
                exact[0]
            )


def test_a_batch_of_any_shape_and_layout_and_size(rng):
    p = rng.normal(size=(4, 4, 3, 5000)).transpose(2, 3, 0, 1)  # the batch last in memory
    got = mixing.singular_values(p)
    assert got.shape == (3, 5000, 4)
    np.testing.assert_allclose(got, np.linalg.svd(p, compute_uv=False), atol=1e-13)
    few = mixing.singular_values(torch.asarray(p[:, :7].copy()))
    np.testing.assert_allclose(few, got[:, :7], atol=1e-13)


def test_the_input_is_left_as_it_was(array, rng):
    p = rng.normal(size=(COUNT, 4, 4))
    given = array(p.copy())
    mixing.singular_values(given)
    np.testing.assert_array_equal(given, p)


# The numerical radius
