"""Gradient kernels and mean-field maps against numpy, simulated batches and closed forms."""

import math

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import gradients, meanfield


def test_gradient_norm(array, rng):
    g = rng.normal(size=(3, 6, 4))
    np.testing.assert_allclose(
        gradients.gradient_norm(array(g)), np.linalg.norm(g, axis=(-2, -1)), rtol=1e-13
    )
    np.testing.assert_allclose(
        gradients.gradient_norm(array(g), rms=True), np.sqrt((g**2).mean((-2, -1))), rtol=1e-13
    )
    mask = rng.random((3, 6)) < 0.5
    mask[:, 0] = True
    g[~mask] = np.inf
    own_mask = mask if isinstance(array(0.0), np.ndarray) else torch.asarray(mask)
    expected = [np.sqrt((g[b][mask[b]] ** 2).mean()) for b in range(3)]
    np.testing.assert_allclose(
        gradients.gradient_norm(array(g), rms=True, mask=own_mask), expected, rtol=1e-13
    )


def test_gradient_norm_neither_over_nor_underflows(array):
    for size in (1e-200, 1e200):
        assert float(gradients.gradient_norm(array([[3 * size, 4 * size]]))) == pytest.approx(5 * size)
    assert float(gradients.gradient_norm(array([[0.0, 0.0]]))) == 0.0


def test_signal_propagation(array, rng):
    x = rng.normal(size=(2, 30, 5)) * 3 + np.arange(5)
    found = gradients.signal_propagation(array(x))
    np.testing.assert_allclose(found.squared_mean, (x.mean(1) ** 2).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(found.variance, x.var(1).mean(-1), rtol=1e-12)
    far = gradients.signal_propagation(array(np.float64(1e8) + np.tile([[0.0], [1.0]], (5, 2))))
    assert float(far.variance) == 0.25


# Mean field


@pytest.mark.parametrize("q", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("c", [-0.5, 0.0, 0.4, 0.95, 1.0])
def test_erf_maps_by_the_arcsine_kernel(q, c):
    def kernel(corr):
        return 2 / np.pi * np.arcsin(2 * q * corr / (1 + 2 * q))

    length = 1.5**2 * kernel(1.0) + 0.2**2
    assert meanfield.q_map(q, 1.5, 0.2, "erf") == pytest.approx(length, rel=1e-9)
    expected = (1.5**2 * kernel(c) + 0.2**2) / length
    assert meanfield.c_map(c, q, 1.5, 0.2, "erf") == pytest.approx(expected, rel=1e-8)
    slope = 1.5**2 * 4 / np.pi / np.sqrt(1 + 4 * q)
    assert meanfield.chi_1(1.5, 0.2, "erf", q) == pytest.approx(slope, rel=1e-9)


def test_slope_of_the_correlation_map_at_one_is_chi():
    q = 1.0
    for _ in range(200):
        q = meanfield.q_map(q, 1.4, 0.3, "tanh")
    assert meanfield.q_map(q, 1.4, 0.3, "tanh") == pytest.approx(q, rel=1e-11)
    step = 1e-5
    slope = (1 - meanfield.c_map(1 - step, q, 1.4, 0.3, "tanh")) / step
    assert meanfield.chi_1(1.4, 0.3, "tanh", q) == pytest.approx(slope, rel=1e-4)
    assert meanfield.chi_1(1.4, 0.3, np.tanh, q) == pytest.approx(
        meanfield.chi_1(1.4, 0.3, "tanh", q), rel=1e-8
    )


def test_relu_and_the_edge_of_chaos():
    assert meanfield.c_map(1.0, 2.0, 2**0.5, 0.0, "relu") == pytest.approx(1)
    assert meanfield.c_map(-1.0, 2.0, 2**0.5, 0.0, "relu") == pytest.approx(0, abs=1e-15)
    assert meanfield.chi_1(1.0, 0.0, "tanh", 0.0) == pytest.approx(1)
    assert math.isnan(meanfield.c_map(0.5, 0.0, 1.0, 0.0, "tanh"))
    with pytest.raises(ValueError, match="expected one of linear, relu, tanh, erf"):
        meanfield.q_map(1.0, 1.0, 0.0, "swish")
    with pytest.raises(ValueError, match="squared length"):
        meanfield.q_map(-1.0, 1.0, 0.0, "relu")
    with pytest.raises(ValueError, match="between -1 and 1"):
        meanfield.c_map(1.1, 1.0, 1.0, 0.0, "relu")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1j, "1", None, np.ones(2)], ids=repr)
def test_arguments_of_the_maps_that_are_no_number_are_refused(bad):
    for scales in ((bad, 0.0), (1.0, bad)):
        for call in (
            lambda w, b: meanfield.q_map(1.0, w, b, "relu"),
            lambda w, b: meanfield.c_map(0.5, 1.0, w, b, "relu"),
            lambda w, b: meanfield.chi_1(w, b, "relu", 1.0),
        ):
            with pytest.raises(ValueError, match="expected one finite number each"):
                call(*scales)
    with pytest.raises(ValueError, match="expected a squared length"):
        meanfield.q_map(bad, 1.0, 0.0, "relu")
    with pytest.raises(ValueError, match="expected a correlation"):
        meanfield.c_map(bad, 1.0, 1.0, 0.0, "relu")
    with pytest.raises(ValueError, match=r"phi is .*; expected one of linear"):
        meanfield.q_map(1.0, 1.0, 0.0, [bad])


def test_the_maps_take_the_numbers_of_numpy():
    for one in (np.float32(1.0), np.int64(1), np.array(1.0)):
        assert meanfield.q_map(one, one, one, "linear") == pytest.approx(2.0)


def test_wide_random_network_follows_the_maps(rng):
    width = 2000
    x = rng.normal(size=(2, width))
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    w = rng.normal(size=(width, width)) * 1.4 / width**0.5
    h = np.tanh(x) @ w.T + 0.3 * rng.normal(size=width)
    assert (h[0] ** 2).mean() == pytest.approx(meanfield.q_map(1.0, 1.4, 0.3, "tanh"), rel=0.1)
    assert np.corrcoef(h)[0, 1] == pytest.approx(meanfield.c_map(0.6, 1.0, 1.4, 0.3, "tanh"), abs=0.05)
