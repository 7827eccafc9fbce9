"""What the exact values of `test_any_array` leave out: tiny angles, medians of masked rows, sizes beyond float64."""

import numpy as np
import pytest

from depthscope.diagnostics.kernels import geometry, gradients


@pytest.mark.parametrize("small", [1e-3, 1e-8, 1e-12, 1e-15])
def test_angles_keep_their_digits_near_zero(array, small):
    x, y = array([[1.0, 0.0]]), array([[np.cos(small), np.sin(small)]])
    assert float(geometry.angular_distance(x, y)) == pytest.approx(small / np.pi, rel=1e-9)
    assert float(geometry.angular_distance(x, -y)) == pytest.approx(1 - small / np.pi, rel=1e-15)
    assert float(geometry.block_influence(x, y)) == pytest.approx(small**2 / 2, rel=1e-4)


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


def test_a_gradient_by_entry_neither_over_nor_underflows(array):
    for size in (1e-200, 1.0, 1e200):
        g = array([[3 * size, 4 * size], [np.inf, 0.0]])
        mask = array([True, False], "bool")
        assert float(gradients.gradient_norm(g, mask=mask)) == pytest.approx(5 * size)
        assert float(gradients.gradient_norm(g, rms=True, mask=mask)) == pytest.approx(5 * size / 2**0.5)
    assert float(gradients.gradient_norm(array([[0.0, 0.0]]))) == 0.0


def test_the_variance_of_a_channel_keeps_its_digits_at_any_offset(array):
    far = gradients.channel_variance(array(np.float64(1e8) + np.tile([[0.0], [1.0]], (5, 2))))
    assert float(far) == 0.25
