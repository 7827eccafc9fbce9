"""Gradient kernels and mean-field maps against numpy, simulated batches and closed forms."""

import numpy as np
import pytest
import torch

from depthscope.diagnostics.kernels import gradients


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
