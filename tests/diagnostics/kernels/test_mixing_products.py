"""Products over depth against exact fractions, mpmath and the laws that they must keep."""

import math

import mpmath
import numpy as np
import pytest

from depthscope.diagnostics.kernels import mixing


def test_row_stochastic_matrices_keep_a_forward_gain_of_one_at_any_depth(array, rng):
    h = mixing.sinkhorn(2 * rng.normal(size=(1000, 4, 4)))
    prefix, scale = mixing.prefix_composites(array(h), return_log_scale=True)
    np.testing.assert_allclose(mixing.log_forward_gain(prefix, scale), 0.0, atol=1e-12)


def test_explosion_and_fading_far_beyond_float64(array, rng):
    """1000 free matrices: a gain near 10^700 up, and as far down, to the last digits of its logarithm."""
    for size in (5.0, 0.05, 1e200, 1e-200):
        h = size * rng.normal(size=(1000, 3, 3))
        with mpmath.workdps(40):
            product = mpmath.eye(3)
            for layer in h:
                product = mpmath.matrix(layer.tolist()) * product
            sums = [abs(mpmath.fsum(product[i, j] for j in range(3))) for i in range(3)]
            columns = [abs(mpmath.fsum(product[i, j] for i in range(3))) for j in range(3)]
            expected, back = float(mpmath.log(max(sums))), float(mpmath.log(max(columns)))
        p, scale = mixing.composite(array(h), return_log_scale=True)
        assert float(mixing.log_forward_gain(p, scale)) == pytest.approx(expected, rel=1e-12)
        assert float(mixing.log_backward_gain(p, scale)) == pytest.approx(back, rel=1e-12)


# What is left of the differences


def difference_gain(layers):
    """Ln σ₁ of the product off the mean, in 60 digits."""
    n = len(layers[0])
    basis = mpmath.matrix(n, n - 1)
    for k in range(1, n):
        for i in range(k):
            basis[i, k - 1] = 1 / mpmath.sqrt(k * (k + 1))
        basis[k, k - 1] = -k / mpmath.sqrt(k * (k + 1))
    product = mpmath.eye(n)
    for layer in layers:
        product = mpmath.matrix(layer.tolist()) * product
    return float(mpmath.log(max(mpmath.svd_r(basis.T * product * basis, compute_uv=False))))


def test_deflated_gain_by_mpmath_far_below_rounding(array, rng):
    """Row- and column-stochastic to rounding only: the blocks multiply, what passes through the mean is left out."""
    h = mixing.sinkhorn(rng.normal(size=(120, 4, 4)), steps=400)
    with mpmath.workdps(160):
        exact = [exactly_stochastic(layer) for layer in h]
        expected = [difference_gain(exact[: k + 1]) for k in (9, 59, 119)]
    got = np.asarray(mixing.deflated_gain(array(h)))
    assert got[119] < math.log(1e-16) * 2
    np.testing.assert_allclose(got[[9, 59, 119]], expected, rtol=1e-11)


def exactly_stochastic(layer):
    """The matrix with its last row and column set so that all sums are 1 in every digit."""
    n = len(layer)
    found = mpmath.matrix(layer.tolist())
    for i in range(n - 1):
        found[i, n - 1] = 1 - mpmath.fsum(found[i, j] for j in range(n - 1))
    for j in range(n):
        found[n - 1, j] = 1 - mpmath.fsum(found[i, j] for i in range(n - 1))
    return np.array(found.tolist(), dtype=object)
