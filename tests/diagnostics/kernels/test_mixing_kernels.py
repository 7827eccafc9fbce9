"""Mixing matrices and their products over depth against dense formulas, closed forms, loops and mpmath."""

import math

import mpmath
import numpy as np
import pytest

from depthscope.diagnostics.kernels import mixing, rank


def product(*matrices):
    """Later layer on the left, by numpy."""
    total = np.eye(matrices[0].shape[-1])
    for m in matrices:
        total = m @ total
    return total


# One matrix


@pytest.fixture
def p(rng):
    return rng.normal(size=(2, 3, 4, 4))


def test_gains_are_signed_sums(array, p):
    np.testing.assert_allclose(mixing.forward_gain(array(p)), np.abs(p.sum(-1)).max(-1), rtol=1e-13)
    np.testing.assert_allclose(mixing.backward_gain(array(p)), np.abs(p.sum(-2)).max(-1), rtol=1e-13)
    for order in (1, 2, np.inf):
        np.testing.assert_allclose(
            mixing.operator_gain(array(p), order), np.linalg.norm(p, order, axis=(-2, -1))
        )
    hidden = array([[1.0, -1.0], [0.0, 1.0]])
    assert float(mixing.forward_gain(hidden)) == 1.0 < float(mixing.operator_gain(hidden)) == 2.0
    with pytest.raises(ValueError, match=r"expected 1, 2 or math\.inf"):
        mixing.operator_gain(p, 3)
    np.testing.assert_allclose(
        mixing.forward_gain(array(p)), mixing.backward_gain(array(np.swapaxes(p, -1, -2)))
    )


def test_attenuation(array):
    found = mixing.attenuation(array([[0.5, -0.4], [0.0, 2.0]]))
    assert float(found.row) == pytest.approx(0.1)
    assert float(found.column) == pytest.approx(0.5)


def test_spectra_by_numpy(array, p):
    np.testing.assert_allclose(
        mixing.singular_values(array(p)), np.linalg.svd(p, compute_uv=False), rtol=1e-10
    )
    values = np.asarray(mixing.eigenvalues(array(p)))
    assert values.dtype == np.complex128
    assert (np.diff(np.abs(values), axis=-1) <= 1e-12).all()
    np.testing.assert_allclose(values.sum(-1), np.trace(p, axis1=-2, axis2=-1), atol=1e-12)
    np.testing.assert_allclose(values.prod(-1), np.linalg.det(p), atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_singular_values_by_numpy(array, rng, n):
    free = rng.normal(size=(200, n, n))
    kinds = (
        free * 10.0 ** rng.integers(-150, 150, size=(200, 1, 1)),
        free * 10.0 ** -rng.integers(0, 14, size=(200, n, 1)),  # rows of other sizes
        np.eye(n) + 1e-9 * free,
        1 / n + 1e-9 * free,
        rng.normal(size=(200, n, 1)) * rng.normal(size=(200, 1, n)),
        np.stack([np.zeros((n, n)), np.ones((n, n))]),
    )
    p = np.concatenate(kinds)
    expected = np.linalg.svd(p, compute_uv=False)
    got = np.asarray(mixing.singular_values(array(p)))
    assert (np.abs(got - expected) <= 1e-14 * expected[:, :1]).all()


def test_cyclic_permutation(array):
    cycle = np.roll(np.eye(4), 1, axis=0)
    assert np.abs(np.asarray(mixing.eigenvalues(array(cycle)))) == pytest.approx(np.ones(4))
    assert float(mixing.identity_distance(array(cycle))) == pytest.approx(2**0.5)


def test_violation_separates_causes(array):
    found = mixing.doubly_stochastic_violation(array([[1.2, -0.2], [0.1, 0.9]]))
    assert [float(v) for v in found] == pytest.approx([0.0, 0.3, 0.2], abs=1e-12)


def test_single_stream(array):
    one = array([[0.7]])
    assert float(mixing.identity_distance(one)) == pytest.approx(0.3)
    assert float(mixing.singular_values(array([[-0.7]]))[0]) == 0.7
    stack = array(np.full((3, 1, 1), 0.5))
    assert np.isnan(np.asarray(mixing.deflated_gain(stack))).all()


def test_refusals():
    with pytest.raises(ValueError, match="expected square"):
        mixing.forward_gain(np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least 3 dims"):
        mixing.composite(np.eye(2))
    bad = np.eye(3)
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"1 NaN or infinite values of 9.*\(1, 2\)"):
        mixing.forward_gain(bad)
    with pytest.raises(ValueError, match="'row' or 'column'"):
        mixing.sinkhorn(np.eye(2), last="rows")
    for steps in (0, 2.5, np.nan, "20"):
        with pytest.raises(ValueError, match=r"steps is .*; expected a whole number, 1 or more"):
            mixing.sinkhorn(np.eye(2), steps=steps)
    with pytest.raises(ValueError, match="find what made them") as refusal:
        mixing.sinkhorn(bad)
    assert "mask" not in str(refusal.value)


# Sinkhorn


def test_sinkhorn_is_the_plain_iteration(array, rng):
    logits = rng.normal(size=(5, 4, 4)) * 3
    m = np.exp(logits)
    for _ in range(20):
        m = m / m.sum(-2, keepdims=True)
        m = m / m.sum(-1, keepdims=True)
    got = mixing.sinkhorn(array(logits))
    np.testing.assert_allclose(got, m, rtol=1e-10)
    found = mixing.doubly_stochastic_violation(got)
    assert float(found.row.max()) < 1e-14
    assert float(found.column.max()) > float(found.row.max())
    turned = mixing.sinkhorn(array(np.swapaxes(logits, -1, -2)), last="column")
    np.testing.assert_allclose(np.swapaxes(np.asarray(turned), -1, -2), m, rtol=1e-10)


def test_sinkhorn_survives_any_range_and_cannot_always_converge(array):
    wide = mixing.sinkhorn(array([[900.0, -900.0], [900.0, 0.0]]))
    assert np.isfinite(np.asarray(wide)).all()
    assert float(mixing.doubly_stochastic_violation(wide).column) > 1e-2


# Products over depth


@pytest.mark.parametrize("n", [1, 2, 4, 11])
def test_composites_by_numpy(array, rng, n):
    h = rng.normal(size=(5, 2, 3, n, n))
    total = mixing.composite(array(h))
    np.testing.assert_allclose(total, product(*h), atol=1e-11)
    prefix = mixing.prefix_composites(array(h))
    assert tuple(prefix.shape) == h.shape
    for a in range(5):
        np.testing.assert_allclose(prefix[a], product(*h[: a + 1]), atol=1e-11)


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


# The depth kernel


@pytest.fixture
def connections(rng):
    return (
        rng.normal(size=(6, 2, 3, 3)) * 0.5 + np.eye(3),
        rng.normal(size=(6, 2, 3)),
        rng.normal(size=(6, 2, 3)),
    )


def kernel_by_loops(h, pre, post, embedding, head):
    depth, readers, sources = len(h), [*pre, head], [embedding, *post]
    m = np.zeros((depth + 1, depth + 1))
    for k in range(depth + 1):
        for j in range(-1, k):
            m[k, j + 1] = readers[k] @ product(np.eye(3), *h[j + 1 : k]) @ sources[j + 1]
    return m


def test_depth_kernel_by_loops(array, rng, connections):
    h, pre, post = connections
    embedding, head = rng.normal(size=3), rng.normal(size=(2, 3))
    full = mixing.depth_kernel(*map(array, connections), embedding=array(embedding), head=array(head))
    for b in range(2):
        expected = kernel_by_loops(h[:, b], pre[:, b], post[:, b], embedding, head[b])
        np.testing.assert_allclose(full[b], expected, atol=1e-12)
    plain = mixing.depth_kernel(*map(array, connections))
    np.testing.assert_allclose(plain, full[:, :6, 1:], atol=1e-13)
    assert (np.triu(np.asarray(plain)) == 0).all()


def test_depth_kernel_at_great_depth(array):
    h = array(np.full((700, 1, 1), 10.0))
    ones = array(np.ones((700, 1)))
    m = np.asarray(mixing.depth_kernel(h, ones, ones))
    assert m[300, 0] == pytest.approx(1e299, rel=1e-10)
    assert m[699, 0] == math.inf
    assert not np.isnan(m).any()
    down = np.asarray(mixing.depth_kernel(h * 0.01, ones, ones))
    assert down[250, 0] == pytest.approx(1e-249, rel=1e-10)


def test_depth_kernel_refuses_shapes(connections):
    h, pre, post = connections
    with pytest.raises(ValueError, match=r"h_pre has shape \(5, 2, 3\); expected \(6, 2, 3\)"):
        mixing.depth_kernel(h, pre[:5], post)
    with pytest.raises(ValueError, match="head has shape"):
        mixing.depth_kernel(h, pre, post, head=np.ones(4))


def test_effective_streams_is_at_most_the_streams(array, connections):
    m = mixing.depth_kernel(*map(array, connections), embedding=array(np.ones(3)), head=array(np.ones(3)))
    streams = np.asarray(mixing.effective_streams(m, embedding=True))
    assert streams.shape == (2, 7)
    assert (streams <= 3 + 1e-9).all()
    assert streams[0, 0] == pytest.approx(1)  # only the embedding is before the first cut
    plain = np.asarray(mixing.effective_streams(mixing.depth_kernel(*map(array, connections))))
    block = np.asarray(m)[1, 3:6, 1:4]
    expected = float(rank.effective_rank_of(np.linalg.svd(block, compute_uv=False)))
    assert plain[1, 2] == pytest.approx(expected, rel=1e-9)


def test_independent_streams_count_in_full(array):
    """Layer 2k + s reads and writes stream s of two only: the blocks have two equal directions."""
    unit = np.tile(np.eye(2), (4, 1))
    m = mixing.depth_kernel(array(np.tile(np.eye(2), (8, 1, 1))), array(unit), array(unit))
    assert float(mixing.effective_streams(m)[3]) == pytest.approx(2)
    assert np.isnan(np.asarray(mixing.effective_streams(array(np.zeros((3, 3)))))).all()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_streams_across_cuts_are_those_of_the_depth_kernel(array, rng, n):
    h = np.eye(n) + 0.4 * rng.normal(size=(12, 5, n, n))
    reads, writes = rng.normal(size=(2, 12, 5, n))
    reads[4:] = 0.0 if n == 2 else reads[4:]  # nothing is read after the fifth
    found = np.asarray(mixing.streams_across(*map(array, (h, reads, writes))))
    expected = mixing.effective_streams(mixing.depth_kernel(h, reads, writes))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_streams_across_cuts_know_no_overflow(rng):
    h = 3 * rng.normal(size=(1000, 2, 4, 4))
    reads, writes = rng.normal(size=(2, 1000, 2, 4))
    found = mixing.streams_across(h, reads, writes)
    assert (found >= 1 - 1e-12).all()
    assert (found <= 4 + 1e-12).all()
    scaled = mixing.streams_across(h[:40] * 1e30, reads[:40] * 1e-150, writes[:40] * 1e150)
    assert np.isfinite(scaled).all()
    with pytest.raises(ValueError, match=r"h_pre and h_post have shapes"):
        mixing.streams_across(h, reads[:2], writes)
