"""What leaves a kernel's value as it is, what must not, what adds up, and what comes in order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from depthscope.diagnostics.kernels import geometry, rank, similarity
from tests.diagnostics.kernels.measures import MEASURES, ONE, UNIT_FREE, measured

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(14, 40), st.integers(2, 6))
RANKS = [name for name in ONE if name not in ("singular_values", "token_cosine")]
SHAPES_OF_POINTS = (
    *("linear_cka", "unbiased linear_cka", "procrustes"),
    *("cka_matrix", "unbiased cka_matrix"),
    *("cka_matrix of two sides", "minibatch_cka"),
)
OF_ROWS = ("row_cosine", "massive_activations", "massive_tokens")
quick = settings(max_examples=8, deadline=None)


def sides(seed, shape):
    """Two sides that share something."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.geomspace(1.0, 0.2, shape[1]) + rng.normal(size=shape[1])
    return rng, x, x @ rng.normal(size=(shape[1], shape[1])) + rng.normal(size=shape)


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


@pytest.mark.parametrize("name", SHAPES_OF_POINTS)
@given(seed=SEEDS, shape=SHAPES, scale=st.floats(1e-6, 1e6))
@quick
def test_rotation_scale_and_offset_do_not_matter(name, seed, shape, scale):
    rng, x, y = sides(seed, shape)
    turned = scale * (x @ rotation(rng, shape[1]) + 10.0 * rng.normal(size=shape[1]))
    np.testing.assert_allclose(measured(name, turned, y), measured(name, x, y), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("unbiased", [False, True])
@given(seed=SEEDS, shape=st.tuples(st.integers(5, 60), st.integers(1, 80)))
@quick
def test_cka_does_not_see_an_offset(unbiased, offset, seed, shape):
    """The numbers are those of float32, in which peers give 1.45, 0 and NaN."""
    rng, x, y = sides(seed, shape)
    far = [(side + offset * rng.normal(size=shape[1])).astype(np.float32) for side in (x, y)]
    near = [side.astype(float) - side.astype(float).mean(axis=0) for side in far]
    due = similarity.linear_cka(*near, unbiased=unbiased)
    assert similarity.linear_cka(*far, unbiased=unbiased) == pytest.approx(due, abs=1e-6, nan_ok=True)
    table = similarity.cka_matrix(np.stack(far), unbiased=unbiased)
    assert table[0, 1] == pytest.approx(due, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", MEASURES)
@given(seed=SEEDS, shape=SHAPES)
@quick
def test_the_order_of_tokens_does_not_matter(name, seed, shape):
    rng, x, y = sides(seed, shape)
    order = rng.permutation(shape[0])
    due = measured(name, x, y)
    got = measured(name, x[order], y[order])
    np.testing.assert_allclose(got, due[order] if name in OF_ROWS else due, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", UNIT_FREE)
@given(seed=SEEDS, shape=SHAPES, power=st.integers(-100, 100))
@quick
def test_units_do_not_matter(name, seed, shape, power):
    """Powers of two change no digit of the input."""
    _, x, y = sides(seed, shape)
    np.testing.assert_allclose(measured(name, x * 2.0**power, y), measured(name, x, y), rtol=1e-9, atol=1e-11)


@given(seed=SEEDS, n=st.integers(1, 30), d=st.integers(1, 30), tilt=st.floats(-2, 2), center=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_chain_of_ranks(seed, n, d, tilt, center):
    """Rank ≥ effective rank ≥ entropy rank ≥ participation ratio ≥ stable rank ≥ 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.exp(tilt * np.arange(d)) + rng.normal()
    assume(not (center and n == 1))
    chain = [
        float(of(x, center=center))
        for of in (
            lambda x, center: rank.numerical_rank(x, center=center, rtol=1e-30),
            rank.effective_rank,
            rank.entropy_rank,
            rank.participation_ratio,
            rank.stable_rank,
            lambda x, center: 1.0,
        )
    ]
    assert all(larger >= smaller * (1 - 1e-11) for larger, smaller in pairwise(chain))


@given(seed=SEEDS, shape=SHAPES)
@quick
def test_what_must_change_changes(seed, shape):
    """A stretched axis lowers the ranks, a common part raises cosines."""
    _, x, _ = sides(seed, shape)
    x = x - x.mean(axis=0)
    stretched = x * np.r_[100.0, np.ones(shape[1] - 1)]
    for name in ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank"):
        assert getattr(rank, name)(stretched) < getattr(rank, name)(
            x @ np.linalg.inv(np.linalg.cholesky(x.T @ x)).T
        )
    assert geometry.token_cosine(x + 20.0) > geometry.token_cosine(x)
    assert rank.dong_residual(x + 20.0) < rank.dong_residual(x)
