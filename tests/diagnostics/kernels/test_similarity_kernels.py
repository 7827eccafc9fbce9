"""Similarity against centring matrices, explicit sums, scipy, invariances and deliberate failures."""

import itertools

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace

from depthscope.diagnostics.kernels import similarity
from depthscope.diagnostics.kernels.similarity import layer_cka, neighbours, pairwise
from tests.diagnostics.kernels import exact

PAIRWISE = {
    "linear_cka": similarity.linear_cka,
    "unbiased_cka": lambda x, y, **k: similarity.linear_cka(x, y, unbiased=True, **k),
    "procrustes": similarity.procrustes,
    "mutual_knn": lambda x, y, **k: similarity.mutual_knn(x, y, 3, **k),
    "cknna": lambda x, y, **k: similarity.cknna(x, y, 4, **k),
}


def hsic1_by_sums(k, q):
    """The U-statistic as sums over distinct indices."""
    n = len(k)
    p2 = sum(k[i, j] * q[i, j] for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    p3 = sum(k[i, j] * q[i, m] for i, j, m in itertools.permutations(range(n), 3)) / (n * (n - 1) * (n - 2))
    p4 = sum(k[i, j] * q[m, r] for i, j, m, r in itertools.permutations(range(n), 4))
    return p2 - 2 * p3 + p4 / (n * (n - 1) * (n - 2) * (n - 3))


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


# Every pairwise measure


LAYERED = [name for name in PAIRWISE if name not in ("linear_cka", "unbiased_cka")]


@pytest.mark.parametrize("size", [pairwise.CACHE_BYTES, 1])
@pytest.mark.parametrize("name", LAYERED)
def test_one_stack_gives_all_pairs_of_its_layers(monkeypatch, array, rng, name, size):
    monkeypatch.setattr(pairwise, "CACHE_BYTES", size)
    measure, stack = PAIRWISE[name], rng.normal(size=(3, 24, 5))
    stack[1] += stack[0]
    mask = rng.random(24) < 0.8
    got = measure(array(stack), None, mask=mask)
    assert type(got) is type(array(stack))
    pairs = np.array([[float(measure(a[mask], b[mask])) for b in stack] for a in stack])
    # One number for both orders, that of the earlier layer first.
    pairs = np.triu(pairs) + np.triu(pairs, 1).T
    np.testing.assert_allclose(got, pairs, rtol=1e-11, atol=1e-12)


def test_what_is_no_stack_of_layers_is_refused(array, rng):
    for shape in ((24, 5), (2, 3, 24, 5), (0, 24, 5)):
        with pytest.raises(ValueError, match=r"expected layers \(L, N, d\)"):
            similarity.procrustes(array(np.ones(shape)))
    with pytest.raises(ValueError, match="all layers have the same rows"):
        similarity.procrustes(array(rng.normal(size=(2, 9, 5))), mask=np.ones((2, 9), bool))


@pytest.mark.parametrize("name", PAIRWISE)
def test_mismatched_rows_are_refused(x, name):
    with pytest.raises(ValueError, match=r"x and y have shapes \(25, 6\) and \(20, 6\)"):
        PAIRWISE[name](x, x[:20])


@pytest.mark.parametrize("name", PAIRWISE)
def test_an_array_beside_a_tensor_is_refused(x, y, name):
    for a, b in ((x, torch.tensor(y)), (torch.tensor(x), y), (torch.tensor(x), y.tolist())):
        with pytest.raises(ValueError, match=r"x is a .* and y a .*; expected both of one library: convert"):
            PAIRWISE[name](a, b)


def test_layers_and_batches_of_two_libraries_are_refused(x):
    arrays, tensors = np.stack([x, 2 * x]), torch.tensor(np.stack([x, 2 * x]))
    with pytest.raises(ValueError, match=r"x is a numpy.ndarray and y a torch.Tensor"):
        similarity.cka_matrix(arrays, y=tensors)
    with pytest.raises(ValueError, match=r"x is a torch.Tensor and y a numpy.ndarray"):
        similarity.minibatch_cka([tensors], [arrays])
    with pytest.raises(ValueError, match=r"batches_x\[0\] is a numpy.ndarray and batches_x\[1\] a torch"):
        similarity.minibatch_cka([arrays, tensors])


@pytest.mark.parametrize("k", [0, 2.0, 2.5, np.nan, "3", None])
@pytest.mark.parametrize("measure", [similarity.mutual_knn, similarity.cknna])
def test_a_number_of_neighbours_is_whole(x, y, measure, k):
    with pytest.raises(ValueError, match=r"k is .*; expected a whole number, 1 or more"):
        measure(x, y, k)
    assert float(measure(x, y, np.int8(5))) == float(measure(x, y, 5))


# CKA


def test_unbiased_hsic_by_sums_over_distinct_indices(array, rng):
    for dx, dy in ((3, 2), (12, 15)):
        x, y = rng.normal(size=(7, dx)) + 1, rng.normal(size=(7, dy)) - 2
        expected = hsic1_by_sums(x @ x.T, y @ y.T)
        assert float(similarity.hsic1(array(x @ x.T), array(y @ y.T))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "dx", "dy"), [(100, 1000, 1000), (60, 20, 90)])
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
    gram = layer_cka._gram_products(np, x, None)
    cross = layer_cka._covariance_products(np, x, None) - np.einsum("lid,lid,mie,mie->lm", x, x, x, x)
    np.testing.assert_allclose(gram, cross, rtol=1e-9)
    monkeypatch.setattr(layer_cka, "BLOCK", 3 * 50 * 7)
    np.testing.assert_allclose(layer_cka._gram_products(np, x, None), gram, rtol=1e-12)


def test_layers_without_variance_are_undefined_alone(array, rng):
    x = walk(rng, 3, 20, 4)
    x[1] = 0.3
    got = np.asarray(similarity.cka_matrix(array(x)))
    assert np.isnan(got[1]).all()
    assert np.isnan(got[:, 1]).all()
    assert np.isfinite(got[np.ix_([0, 2], [0, 2])]).all()
    assert np.asarray(similarity.cka_matrix(array(x[:1]))).tolist() == [[pytest.approx(1)]]
    assert np.isnan(np.asarray(similarity.cka_matrix(array(x[:, :3]), unbiased=True))).all()
    with pytest.raises(ValueError, match=r"expected layers \(L, N, d\)"):
        similarity.cka_matrix(x[0])


def test_batches_that_are_not_of_the_same_layers_are_refused(array, rng):
    x = walk(rng, 3, 10, 6)
    full, narrow, fewer, one = array(x), array(x[..., :4]), array(x[:2]), array(x[0])
    for batches in ([full, narrow], [full, fewer], [one, full], [one, array(x[1, :, :4])]):
        for both in ((batches, None), ([full, full], batches), (batches, [full, full])):
            with pytest.raises(ValueError, match="expected batches of the same layers and features"):
                similarity.minibatch_cka(*both)
    with pytest.raises(ValueError, match=r"\(10, 6\) and \(3, 10, 6\); expected \(n, d\) on both sides"):
        similarity.minibatch_cka([one], [full])
    with pytest.raises(ValueError, match=r"batches_x\[0\] has shape \(1, 3, 10, 6\); expected \(n, d\)"):
        similarity.minibatch_cka([full[None]])
    found = similarity.minibatch_cka([one, one], [narrow[1], narrow[1]])  # two sides may differ in width
    due = similarity.linear_cka(x[0], x[1, :, :4], unbiased=True)
    assert float(found) == pytest.approx(float(due), rel=1e-9)


# Canonical correlations and shapes


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
@pytest.mark.parametrize("noise", [1e-7, 1e-3, 0.05, 0.1, 0.2, 1.0])
def test_procrustes_is_as_sharp_near_as_far(rng, shape, noise):
    x = rng.normal(size=shape)
    turn = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))[0]
    y = x @ turn + noise * rng.normal(size=shape)
    due = float(exact.procrustes(exact.wide(x), exact.wide(y)))
    assert float(similarity.procrustes(x, y)) == pytest.approx(due, rel=2e-8 if noise < 1e-6 else 1e-11)


# Neighbours and distances


def test_a_sort_finds_the_neighbours_that_single_searches_find(monkeypatch, array, rng):
    x = np.round(rng.normal(size=(40, 2)))  # many ties
    similar = array(neighbours.square_distances(np, x))
    found = {}
    for passes in (0, 50):
        monkeypatch.setattr(neighbours, "PASSES", passes)
        found[passes] = [neighbours._neighbours(array_namespace(similar), similar, k) for k in (1, 7, 39)]
    for k, searched, ordered in zip((1, 7, 39), found[50], found[0], strict=True):
        np.testing.assert_array_equal(searched, ordered)
        assert set(searched.sum(1).tolist()) == {k}
