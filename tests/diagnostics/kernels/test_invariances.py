"""What leaves a kernel's value as it is, what must not, what adds up, and what comes in order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from depthscope.diagnostics.kernels import rank
from tests.diagnostics.kernels.measures import MEASURES, UNIT_FREE, measured

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(14, 40), st.integers(2, 6))
SHAPES_OF_POINTS = ("linear_cka", "unbiased linear_cka", "cka_matrix", "unbiased cka_matrix")
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
