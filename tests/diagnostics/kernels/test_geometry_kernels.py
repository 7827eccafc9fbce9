"""Geometry of tokens against loops over pairs, scikit-dimension and closed forms."""

import itertools

import numpy as np
import pytest
import skdim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthscope.diagnostics.kernels import geometry


def as_mask(array, mask):
    return mask if isinstance(array(0.0), np.ndarray) else torch.asarray(mask)


def cosine(a, b):
    return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


def angle(a, b):
    return np.arccos(np.clip(cosine(a, b), -1, 1))


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


def test_curvature_closed_forms(array):
    polygon = np.stack([np.cos(np.arange(9) * np.pi / 4), np.sin(np.arange(9) * np.pi / 4)], axis=1)
    assert float(geometry.curvature(array(polygon))) == pytest.approx(np.pi / 4, rel=1e-12)
    line = np.arange(5.0)[:, None] * np.ones(3)
    assert float(geometry.curvature(array(line))) == 0.0
    assert float(geometry.curvature(array([[0.0], [1.0], [0.0]]))) == pytest.approx(np.pi)
    assert np.isnan(float(geometry.curvature(array([[0.0], [1.0]]))))
    assert np.isnan(float(geometry.curvature(array(np.ones((5, 2))))))
    stops = array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert float(geometry.curvature(stops)) == 0.0  # only the last two steps are successive and move


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


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_recovers_the_exponent(array, rng, alpha):
    s = np.arange(1.0, 301) ** (-alpha / 2)
    fit = geometry.alpha_req_of(array(np.stack([s, 3 * s])), first=5, last=200)
    np.testing.assert_allclose(fit.alpha, [alpha, alpha], rtol=1e-10)
    np.testing.assert_allclose(fit.error, 0, atol=1e-7)
    assert np.asarray(fit.last).tolist() == [200, 200]


def test_alpha_req_and_its_error_equal_numpys_weighted_fit(rng):
    s = np.arange(1.0, 101) ** -0.5 * np.exp(rng.normal(size=100) * 0.1)
    s = np.sort(s)[::-1]
    ranks = np.arange(11, 61)
    line, cov = np.polyfit(np.log(ranks), 2 * np.log(s[10:60]), 1, w=ranks**-0.5, cov=True)
    fit = geometry.alpha_req_of(s, first=11, last=60)
    assert float(fit.alpha) == pytest.approx(-line[0], rel=1e-10)
    assert float(fit.error) == pytest.approx(cov[0, 0] ** 0.5, rel=1e-10)


def test_alpha_req_is_that_of_the_authors_code(rng):
    """Their `stringer_get_powerlaw` with the range 3 to 100 of their example, in its own words."""
    spectrum = np.sort(rng.exponential(size=300))[::-1]
    trange = np.arange(3, 100)
    y = np.log(np.abs(spectrum))[trange][:, None]
    trange = trange + 1
    x = np.concatenate((-np.log(trange)[:, None], np.ones((len(trange), 1))), axis=1)
    w = 1.0 / trange[:, None]
    b = np.linalg.solve(x.T @ (x * w), (w * x).T @ y).flatten()
    assert float(geometry.alpha_req_of(spectrum**0.5).alpha) == pytest.approx(b[0], rel=1e-10)


def test_alpha_req_short_spectra_are_undefined(array, rng):
    fit = geometry.alpha_req(array(rng.normal(size=(6, 40))))
    assert np.isnan(float(fit.alpha))
    fit = geometry.alpha_req(array(rng.normal(size=(2, 40, 30))), first=2)
    assert np.asarray(fit.last).tolist() == [30, 30]
    with pytest.raises(ValueError, match="expected 1 ≤ first < last"):
        geometry.alpha_req_of(np.ones(5), first=3, last=3)


@pytest.mark.parametrize(("dimension", "width"), [(2, 2), (3, 40), (6, 10)])
@pytest.mark.parametrize("discard", [0.0, 0.1])
def test_two_nn_equals_scikit_dimension(array, rng, dimension, width, discard):
    x = rng.random((300, dimension)) @ rng.normal(size=(dimension, width)) + 100
    if discard == 0.0:  # scikit-dimension's last point is at infinity
        estimate = float(geometry.two_nn(array(x), discard=0.0))
        assert estimate == pytest.approx(dimension, rel=0.35)
        return
    expected = skdim.id.TwoNN(discard_fraction=discard).fit(x).dimension_
    assert float(geometry.two_nn(array(x), discard=discard)) == pytest.approx(expected, rel=1e-5)


def test_two_nn_counts_duplicates_once(array, rng):
    x = rng.random((120, 2))
    repeated = np.concatenate([x, x[:50], x[:20]])
    expected = skdim.id.TwoNN().fit(x).dimension_
    assert float(geometry.two_nn(array(repeated))) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(float(geometry.two_nn(array(np.ones((20, 3))))))
    assert np.isnan(float(geometry.two_nn(array(x[:2]))))


def two_nn_of_differences(x):
    """Distances from differences, the line by least squares; 1 − F = 1/10 at the last tenth."""
    distances = np.sort(np.linalg.norm(x[:, None] - x[None, :], axis=-1), axis=1)
    stretch = np.sort(np.log(distances[:, 2] / distances[:, 1]))[: int(0.9 * len(x))]
    level = -np.log(1 - np.arange(1, len(stretch) + 1) / len(x))
    return (stretch @ level) / (stretch @ stretch)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_two_nn_of_tight_clusters_among_scattered_points(array, rng, size):
    """A Gram matrix alone has lost the distances inside a cluster."""
    centres = np.repeat(rng.normal(size=(8, 5)), 15, axis=0)
    x = np.concatenate([centres + size * rng.normal(size=centres.shape), rng.normal(size=(30, 5))])
    assert float(geometry.two_nn(array(x))) == pytest.approx(two_nn_of_differences(x), rel=1e-8)


def test_two_nn_tells_rows_apart_by_any_column(array, rng):
    """Equal in all columns that are looked at first, and a few equal in all."""
    x = np.concatenate([np.ones((60, 31)), rng.normal(size=(60, 9))], axis=1)
    x[:, ::5] = 1.0
    due = two_nn_of_differences(x)
    assert float(geometry.two_nn(array(np.concatenate([x, x[:7]])))) == pytest.approx(due, rel=1e-9)


def test_two_nn_blocks_and_masks(monkeypatch, rng):
    x = rng.normal(size=(2, 90, 3))
    unblocked = geometry.two_nn(x)
    monkeypatch.setattr(geometry.intrinsic_dimension, "BLOCK", 1000)
    np.testing.assert_allclose(geometry.two_nn(x), unblocked, rtol=1e-9)
    mask = rng.random((2, 90)) < 0.7
    np.testing.assert_allclose(geometry.two_nn(x, mask=mask)[1], geometry.two_nn(x[1][mask[1]]), rtol=1e-9)
    with pytest.raises(ValueError, match="expected a share"):
        geometry.two_nn(x, discard=1.0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected equal shapes"):
        geometry.angular_distance(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="'complete' or 'path'"):
        geometry.dirichlet_energy(np.ones((2, 3)), graph="ring")
