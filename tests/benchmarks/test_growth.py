"""The figures of benchmarks.growth are drawn from its results."""

from __future__ import annotations

import pytest

from benchmarks.growth import page

POINTS = [
    {"value": value, "seconds": {"ranks": 1e-3 * value**2}, "operations": {"ranks": float(value**2)}}
    for value in (2, 4, 8, 16)
]


def test_an_exponent_is_that_of_the_last_points():
    assert page.exponents(POINTS)["ranks"] == pytest.approx((2.0, 2.0))


def test_every_factor_has_a_figure(tmp_path):
    page.draw({"factors": dict.fromkeys(page.LABELS, POINTS)}, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"cost-{factor}.svg" for factor in page.LABELS}
