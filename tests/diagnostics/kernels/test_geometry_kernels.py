"""Geometry of tokens against loops over pairs, scikit-dimension and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthscope.diagnostics.kernels import geometry


def as_mask(array, mask):
    return mask if isinstance(array(0.0), np.ndarray) else torch.asarray(mask)


def cosine(a, b):
    return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 9, 5)) + 0.4


@pytest.fixture
def mask(rng):
    mask = np.ones((2, 9), bool)
    mask[0, [0, 4]] = mask[1, [2, 3, 8]] = False
    return mask


def by_matrix(of, x, mask):
    return [of(x[b][mask[b]]) for b in range(len(x))]


def test_token_cosine_is_the_mean_over_pairs(array, x, mask):
    def loops(m):
        return np.mean([cosine(a, b) for a, b in itertools.combinations(m, 2)])

    got = geometry.token_cosine(array(x), mask=as_mask(array, mask))
    np.testing.assert_allclose(got, by_matrix(loops, x, mask), rtol=1e-12)
    got = geometry.token_cosine(array(x), center=True, mask=as_mask(array, mask))
    np.testing.assert_allclose(got, by_matrix(lambda m: loops(m - m.mean(0)), x, mask), rtol=1e-11)


@given(st.integers(0, 10**6), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_token_cosine_ignores_rotation_and_row_scales(seed, scale):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 4))
    turned = (x @ np.linalg.qr(rng.normal(size=(4, 4)))[0]) * rng.uniform(0.1, scale + 0.1, size=(6, 1))
    assert float(geometry.token_cosine(turned)) == pytest.approx(float(geometry.token_cosine(x)), abs=1e-12)
    assert abs(float(geometry.token_cosine(x + 5)) - float(geometry.token_cosine(x))) > 1e-3


@pytest.mark.parametrize("small", [1e-3, 1e-8, 1e-12, 1e-15])
def test_angles_keep_their_digits_near_zero(array, small):
    x, y = array([[1.0, 0.0]]), array([[np.cos(small), np.sin(small)]])
    assert float(geometry.angular_distance(x, y)) == pytest.approx(small / np.pi, rel=1e-9)
    assert float(geometry.angular_distance(x, -y)) == pytest.approx(1 - small / np.pi, rel=1e-15)
    assert float(geometry.block_influence(x, y)) == pytest.approx(small**2 / 2, rel=1e-4)


def test_massive_activations(array, rng):
    x = rng.normal(size=(2, 8, 6)) * 0.1
    x[0, 3, 2], x[0, 5, 1], x[1, 0, 0] = 900.0, 50.0, -2000.0
    found = geometry.massive_activations(array(x))
    assert np.argwhere(np.asarray(found)).tolist() == [[0, 3, 2], [1, 0, 0]]
    assert np.argwhere(np.asarray(geometry.massive_tokens(array(x)))).tolist() == [[0, 3], [1, 0]]
    # large but not against its own median
    assert not np.asarray(geometry.massive_activations(array(x * 0 + 500.0))).any()
    mask = np.ones((2, 8), bool)
    mask[0, 3] = False
    x[0, 3] = np.inf
    assert np.argwhere(np.asarray(geometry.massive_tokens(array(x), mask=as_mask(array, mask)))).tolist() == [
        [1, 0]
    ]


def test_massive_median_is_that_of_the_kept_rows(rng):
    x = np.abs(rng.normal(size=(7, 3)))
    mask = np.array([1, 1, 0, 1, 1, 1, 0], bool)
    middle = np.median(np.abs(x[mask]))
    x[0, 0] = 1000.0
    middle = np.median(np.abs(x[mask]))
    just_above, just_below = 1000 / middle * (1 + 1e-9), 1000 / middle * (1 - 1e-9)
    assert not geometry.massive_activations(x, relative=just_above, mask=mask).any()
    assert geometry.massive_activations(x, relative=just_below, mask=mask).sum() == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected equal shapes"):
        geometry.angular_distance(np.ones((2, 3)), np.ones((2, 4)))
