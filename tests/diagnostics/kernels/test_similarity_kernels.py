"""Similarity against centring matrices, explicit sums, scipy, invariances and deliberate failures."""

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import similarity
from depthscope.diagnostics.kernels.similarity import layer_cka

PAIRWISE = {
    "linear_cka": similarity.linear_cka,
    "unbiased_cka": lambda x, y, **k: similarity.linear_cka(x, y, unbiased=True, **k),
}


def exact_matrix(x, unbiased):
    """Pairwise CKA of centred features from dense float64 Grams."""
    x = np.asarray(x, np.float64)
    grams = [(m - m.mean(0)) @ (m - m.mean(0)).T for m in x]
    n = x.shape[1]

    def hsic(k, q):
        if not unbiased:
            return (k * q).sum()
        k, q = k - np.diag(np.diag(k)), q - np.diag(np.diag(q))
        ones = np.ones(n)
        total = np.trace(k @ q) + (ones @ k @ ones) * (ones @ q @ ones) / ((n - 1) * (n - 2))
        return total - 2 / (n - 2) * (ones @ k @ q @ ones)

    table = np.array([[hsic(k, q) for q in grams] for k in grams])
    return table / np.sqrt(np.outer(np.diag(table), np.diag(table)))


@pytest.fixture
def x(rng):
    return rng.normal(size=(25, 6)) @ rng.normal(size=(6, 6)) + 0.5


@pytest.fixture
def y(rng, x):
    return x[:, :4] * 0.7 + rng.normal(size=(25, 4)) * 2


@pytest.mark.parametrize("name", PAIRWISE)
def test_mismatched_rows_are_refused(x, name):
    with pytest.raises(ValueError, match=r"x and y have shapes \(25, 6\) and \(20, 6\)"):
        PAIRWISE[name](x, x[:20])


@pytest.mark.parametrize("name", PAIRWISE)
def test_an_array_beside_a_tensor_is_refused(x, y, name):
    for a, b in ((x, torch.tensor(y)), (torch.tensor(x), y), (torch.tensor(x), y.tolist())):
        with pytest.raises(ValueError, match=r"x is a .* and y a .*; expected both of one library: convert"):
            PAIRWISE[name](a, b)


# CKA


@pytest.mark.parametrize(("n", "dx", "dy"), [(60, 20, 90)])
def test_null_of_biased_cka(rng, n, dx, dy):
    got = similarity.linear_cka(rng.normal(size=(6, n, dx)), rng.normal(size=(6, n, dy))).mean()
    assert got == pytest.approx(similarity.cka_null(n, dx, dy), rel=0.02)
    assert similarity.cka_null(100, 1000) == pytest.approx(0.91, abs=0.002)


def walk(rng, layers, n, d):
    """A residual-like walk in depth."""
    return rng.normal(size=(layers, n, d)).cumsum(0)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "d"), [(24, 40), (300, 6), (40, 200)])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_cka_matrix_is_exact_at_any_offset(array, rng, n, d, offset, unbiased):
    x = walk(rng, 4, n, d)
    shift = offset * rng.normal(size=d)
    exact = exact_matrix(x, unbiased)
    got = np.asarray(similarity.cka_matrix(array(x + shift), unbiased=unbiased))
    np.testing.assert_allclose(got, exact, atol=1e-9)
    single = (x + shift).astype(np.float32)
    got = np.asarray(similarity.cka_matrix(array(single, "float32"), unbiased=unbiased))
    np.testing.assert_allclose(got, exact_matrix(single, unbiased), atol=1e-6)
    assert got.dtype == np.float64


def test_both_costs_give_the_same_matrix_and_blocks_do_not_matter(monkeypatch, rng):
    x = walk(rng, 3, 50, 20)
    gram = layer_cka._gram_products(np, x)
    cross = layer_cka._covariance_products(np, x) - np.einsum("lid,lid,mie,mie->lm", x, x, x, x)
    np.testing.assert_allclose(gram, cross, rtol=1e-9)
    monkeypatch.setattr(layer_cka, "BLOCK", 3 * 50 * 7)
    np.testing.assert_allclose(layer_cka._gram_products(np, x), gram, rtol=1e-12)


def test_layers_without_variance_are_undefined_alone(array, rng):
    x = walk(rng, 3, 20, 4)
    x[1] = 0.3
    got = np.asarray(similarity.cka_matrix(array(x)))
    assert np.isnan(got[1]).all()
    assert np.isnan(got[:, 1]).all()
    assert np.isfinite(got[np.ix_([0, 2], [0, 2])]).all()
    for unbiased in (False, True):
        assert np.asarray(similarity.cka_matrix(array(x[:1]), unbiased=unbiased)).tolist() == [
            [pytest.approx(1)]
        ]
    assert np.isnan(np.asarray(similarity.cka_matrix(array(x[:, :3]), unbiased=True))).all()
    for odd in (x[0], x[None], x[:0]):
        with pytest.raises(ValueError, match=r"expected layers \(L, N, d\)"):
            similarity.cka_matrix(odd)
