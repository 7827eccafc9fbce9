"""Products and gains between any two depths against exact fractions, mpmath and the laws that they must keep."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthscope.diagnostics.kernels import mixing


def exact_products(h):
    """P_{a→b} in fractions, by pair."""
    found = {}
    for a in range(len(h)):
        product = None
        for b in range(a, len(h)):
            layer = [[Fraction(float(x)) for x in row] for row in h[b]]
            product = layer if product is None else times(layer, product)
            found[a, b] = product
    return found


def times(left, right):
    return [
        [sum(x * y for x, y in zip(row, col, strict=True)) for col in zip(*right, strict=True)]
        for row in left
    ]


def gain_of(product):
    return float(max(abs(sum(row)) for row in product))


def transposed(product):
    return [list(column) for column in zip(*product, strict=True)]


def pair_table(h, *, backward):
    table = {}
    for end, gain, scale in mixing.pair_gains(h, backward=backward):
        for i, value in enumerate(np.asarray(gain) * np.exp(np.asarray(scale))):
            table[(end, end + i) if backward else (i, end)] = value
    return table


@pytest.mark.parametrize("backward", [False, True])
def test_pair_gains_by_fractions(array, rng, backward):
    h = rng.normal(size=(5, 3, 3))
    got = pair_table(array(h), backward=backward)
    exact = exact_products(h)
    assert set(got) == set(exact)
    for pair, product in exact.items():
        expected = gain_of(transposed(product) if backward else product)
        assert float(got[pair]) == pytest.approx(expected, rel=1e-13)


def test_composites_by_fractions(array, rng):
    h = rng.normal(size=(5, 3, 3))
    exact = exact_products(h)
    prefix, suffix = mixing.prefix_composites(array(h)), mixing.suffix_composites(array(h))
    for k in range(5):
        np.testing.assert_allclose(prefix[k], np.array(exact[0, k], dtype=float), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(suffix[k], np.array(exact[k, 4], dtype=float), rtol=1e-12, atol=1e-14)


def test_reduced_tables_are_those_of_the_products(array, rng):
    h = rng.normal(size=(6, 2, 5, 4, 4))
    total = np.asarray(mixing.all_pairs(array(h)))
    upper = np.triu_indices(6)
    for gain in (mixing.forward_gain, mixing.backward_gain):
        got = np.asarray(mixing.all_pairs(array(h), reduce=gain))
        assert got.shape == (6, 6, 2, 5)
        np.testing.assert_allclose(got[upper], gain(total[upper]), rtol=1e-12)
        assert np.isnan(got[np.tril_indices(6, -1)]).all()


@pytest.mark.parametrize("block", [1, 40, 200])
def test_blocks_change_nothing(array, rng, block, monkeypatch):
    h = rng.normal(size=(6, 17, 4, 4))
    expected = [np.asarray(gain) for _, gain, _ in mixing.pair_gains(h)]
    monkeypatch.setattr("depthscope.diagnostics.kernels.mixing.pairs.BLOCK", block * 4)
    for before, (_, gain, _) in zip(expected, mixing.pair_gains(array(h)), strict=True):
        np.testing.assert_allclose(gain, before, rtol=1e-14)


@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_transposing_exchanges_forward_and_backward(n, depth, seed):
    h = np.random.default_rng(seed).normal(size=(depth, n, n))
    forward = pair_table(h, backward=False)
    turned = pair_table(np.swapaxes(h, -1, -2)[::-1], backward=True)
    for (a, b), value in forward.items():
        assert turned[depth - 1 - b, depth - 1 - a] == pytest.approx(value, rel=1e-12)


def test_row_stochastic_matrices_keep_a_forward_gain_of_one_at_any_depth(array, rng):
    h = mixing.sinkhorn(2 * rng.normal(size=(1000, 4, 4)))
    prefix, scale = mixing.prefix_composites(array(h), return_log_scale=True)
    np.testing.assert_allclose(mixing.log_forward_gain(prefix, scale), 0.0, atol=1e-12)
    *_, (_, gain, scale) = mixing.pair_gains(array(h))
    np.testing.assert_allclose(np.log(np.asarray(gain)) + np.asarray(scale), 0.0, atol=1e-12)


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
        *_, (_, gain, scale) = mixing.pair_gains(array(h))
        assert math.log(float(gain[0])) + float(scale[0]) == pytest.approx(expected, rel=1e-12)
        *_, (_, gain, scale) = mixing.pair_gains(array(h), backward=True)
        assert math.log(float(gain[-1])) + float(scale[-1]) == pytest.approx(back, rel=1e-12)


def test_a_layer_of_zeros_gives_zero_and_no_nan(array):
    h = np.stack([np.eye(2) * 1e200, np.zeros((2, 2)), np.eye(2) * 1e200])
    table = np.asarray(mixing.all_pairs(array(h), reduce=mixing.forward_gain))
    assert table[0].tolist() == [pytest.approx(1e200), 0.0, 0.0]
    assert table[2, 2] == pytest.approx(1e200)


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
        onward = difference_gain(exact[60:])
    got = np.asarray(mixing.deflated_gain(array(h)))
    assert got[119] < math.log(1e-16) * 2
    np.testing.assert_allclose(got[[9, 59, 119]], expected, rtol=1e-11)
    assert float(mixing.deflated_gain(array(h), reverse=True)[60]) == pytest.approx(onward, rel=1e-11)


def exactly_stochastic(layer):
    """The matrix with its last row and column set so that all sums are 1 in every digit."""
    n = len(layer)
    found = mpmath.matrix(layer.tolist())
    for i in range(n - 1):
        found[i, n - 1] = 1 - mpmath.fsum(found[i, j] for j in range(n - 1))
    for j in range(n):
        found[n - 1, j] = 1 - mpmath.fsum(found[i, j] for i in range(n - 1))
    return np.array(found.tolist(), dtype=object)


def test_lyapunov_exponents_of_a_repeated_matrix_are_its_eigenvalues(array, rng):
    vectors = rng.normal(size=(4, 4))
    h = vectors @ np.diag([1.5, 0.7, -0.2, 0.01]) @ np.linalg.inv(vectors)
    got = np.asarray(mixing.lyapunov_spectrum(array(np.tile(h, (2000, 1, 1)))))
    np.testing.assert_allclose(got, np.log([1.5, 0.7, 0.2, 0.01]), atol=5e-3)


def test_log_deviation_takes_the_farthest_sum_either_way(array):
    p = array([[[0.5, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]], [[1.0, -1.0], [0.0, 1.0]]])
    got = np.asarray(mixing.log_deviation(p))
    assert got.tolist() == [pytest.approx(math.log(2)), pytest.approx(math.log(3)), math.inf]
    shifted = np.asarray(mixing.log_deviation(p[:2], array([-1.0, 1000.0])))
    assert shifted.tolist() == [pytest.approx(1 + math.log(2)), pytest.approx(1000 + math.log(3))]
