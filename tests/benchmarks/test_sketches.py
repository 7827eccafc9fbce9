"""The row sketch of the benchmarks: additive, evenly hashed, unbiased, near the exact CKA at any offset."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.analysis import sketches
from depthscope.diagnostics.kernels import similarity
from tests.diagnostics.kernels.formula_data import noise, structured, walk

TOKENS = walk(3, 16, 6, seed=80)
ROWS = [noise(300, 64, seed=1), structured(400, 96, seed=2), structured(40, 256, seed=4)]


@pytest.fixture
def rng():
    return np.random.default_rng(20261124)


def random_walk(rng, layers, n, d):
    return rng.normal(size=(layers, n, d)).cumsum(0)


def test_sketch_is_additive_and_the_same_on_both_kinds(rng):
    x = rng.normal(size=(3, 40, 5))
    index = rng.permutation(10**6)[:40] + 5 * 2**33
    total, signs = sketches.row_sketch(x, index, 16, seed=7)
    parts = [sketches.row_sketch(x[:, i : i + 10], index[i : i + 10], 16, seed=7) for i in range(0, 40, 10)]
    np.testing.assert_allclose(sum(p[0] for p in parts), total, atol=1e-12)
    np.testing.assert_array_equal(sum(p[1] for p in parts), signs)
    turned, turned_signs = sketches.row_sketch(torch.asarray(x), torch.asarray(index), 16, seed=7)
    np.testing.assert_allclose(turned, total, atol=1e-12)
    np.testing.assert_array_equal(turned_signs, signs)
    assert (sketches.row_sketch(x, index, 16, seed=8)[1] != signs).any()
    with pytest.raises(ValueError, match="expected one index for each of the 40 rows"):
        sketches.row_sketch(x, index[:3], 16)


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_two_parts_add_up(rng, cut):
    x, index = rng.normal(size=(2, 14, 5)), np.arange(14)
    parts = (
        sketches.row_sketch(x[:, part], index[part], 16) for part in (slice(None, cut), slice(cut, None))
    )
    for total, *pieces in zip(sketches.row_sketch(x, index, 16), *parts, strict=True):
        np.testing.assert_allclose(sum(pieces), total, atol=1e-12)


def test_another_token_gives_another_sketch(rng):
    x = rng.normal(size=(14, 5))
    other = x.copy()
    other[0] += rng.normal(size=5)
    assert not np.allclose(*(sketches.row_sketch(m, np.arange(14), 8)[0] for m in (x, other)))


@pytest.mark.parametrize("x", ROWS, ids=lambda x: str(x.shape))
def test_the_sketch_is_a_product_with_one_sign_in_each_column(x):
    """Clarkson & Woodruff: the matrix depends on the index alone."""
    index = np.arange(len(x)) * 7 + 10**9
    matrix = sketches.row_sketch(np.eye(len(index)), index, 32, seed=5)[0]
    assert np.array_equal(np.sort(np.abs(matrix), axis=0)[-1], np.ones(len(index)))
    assert np.count_nonzero(matrix) == len(index)
    sketch, signs = sketches.row_sketch(x, index, 32, seed=5)
    np.testing.assert_allclose(sketch, matrix @ x, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(signs, matrix.sum(axis=1), rtol=1e-9, atol=1e-13)
    rounded = x.astype(np.float32)
    np.testing.assert_allclose(
        sketches.row_sketch(rounded, index, 32, seed=5)[0],
        sketches.row_sketch(rounded.astype(float), index, 32, seed=5)[0],
        rtol=1e-6,
        atol=1e-12,
    )


def test_hash_fills_buckets_and_signs_evenly():
    h = sketches._hashed(np, np.arange(64_000), 3)
    counts = np.bincount((h >> 1) % 64, minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert abs((1 - 2 * (h & 1)).mean()) < 0.02


def test_sketched_products_are_unbiased(rng):
    """Averaged over seeds, off-diagonal bucket products give (1 − 1/m) Σ_{i≠j} K_ij L_ij."""
    x = random_walk(rng, 2, 30, 4)
    x -= x.mean(1, keepdims=True)
    k = x @ x.transpose(0, 2, 1)
    off = 1 - np.eye(30)
    truth = np.einsum("aij,bij,ij->ab", k, k, off) * (1 - 1 / 8)
    total = np.zeros((2, 2))
    for seed in range(3000):
        s, _ = sketches.row_sketch(x, np.arange(30), 8, seed=seed)
        p = (s @ s.transpose(0, 2, 1)) * (1 - np.eye(8))
        total += np.einsum("aij,bij->ab", p, p) / 3000
    np.testing.assert_allclose(total, truth, rtol=0.08)


def test_without_collisions_cka_is_that_of_the_products_of_different_tokens():
    """The buckets' products are then those of the tokens, times the square of a sign."""
    sketch, signs = sketches.row_sketch(TOKENS, np.arange(TOKENS.shape[1]), 512, seed=3)
    assert np.count_nonzero(signs) == np.abs(signs).sum() == TOKENS.shape[1]
    x = TOKENS - TOKENS.mean(axis=1, keepdims=True)
    spread = (x**2).sum(axis=(1, 2))
    n, m = x.shape[1], sketch.shape[1]
    off = [k - np.diag(np.diag(k)) for k in (a @ a.T for a in x)]
    table = np.array([[np.sum(k * q) for q in off] for k in off]) / (1 - 1 / m)
    table += np.outer(spread, spread) / ((n - 1) * (n - 2))
    expected = table / np.sqrt(np.outer(np.diag(table), np.diag(table)))
    got = sketches.cka_from_sketch(sketch, signs, TOKENS.mean(axis=1), diagonals=spread, count=n)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("array", [np.asarray, torch.asarray], ids=["numpy", "torch"])
def test_cka_from_sketch_is_near_the_exact_one_at_any_offset(array, rng):
    x = random_walk(rng, 4, 3000, 16)
    exact = similarity.cka_matrix(x[:, :1500], unbiased=True)
    for offset in (0.0, 1e4):
        away = x[:, :1500] + offset * rng.normal(size=16)
        s, c = sketches.row_sketch(array(away), array(np.arange(1500)), 512)
        spread = ((away - away.mean(1, keepdims=True)) ** 2).sum((1, 2))
        got = sketches.cka_from_sketch(s, c, array(away.mean(1)), diagonals=array(spread), count=1500)
        np.testing.assert_allclose(got, exact, atol=0.04)
    with pytest.raises(ValueError, match="both or neither"):
        sketches.cka_from_sketch(s, c, array(away.mean(1)), count=3)
