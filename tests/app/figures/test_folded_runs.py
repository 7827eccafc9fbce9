"""Are seeds drawn as their mean in a band with its interval, and is nothing else put together?"""

import numpy as np
import pytest
import scipy.stats

from depthscope.app.figures import Line, Lines
from depthscope.app.figures.build.values import folded

X = np.arange(3.0)


def line(group, y, variant="", **more):
    return Line(X[: len(y)], np.array(y), f"{group}{variant}", group=group, **more)


def figure_of(*lines, runs=()):
    return Lines("rank", "Rank", "depth", "rank", lines, runs={name: i for i, name in enumerate(runs)})


def test_seeds_become_a_mean_with_a_band_and_others_stay():
    figure = figure_of(
        line("a0", [1.0, 2.0, np.nan]),
        line("a0", [9.0, 9.0, 9.0], role="null"),
        line("a1", [3.0, np.nan, np.nan]),
        line("b", [5.0, 5.0, 5.0]),
        line("a2", [4.0, 4.0]),  # of another depth
        Line(X, np.full(3, 1.0), "limit", role="threshold"),
        runs=("b", "a0", "a1", "a2"),
    )
    found = folded(figure, dict.fromkeys(("a0", "a1", "a2"), "a, 3 seeds"))
    mean, shallow, null, other, limit = found.lines
    np.testing.assert_array_equal(mean.y, [2.0, 2.0, np.nan])
    np.testing.assert_array_equal(mean.lower, [1.0, 2.0, np.nan])
    np.testing.assert_array_equal(mean.upper, [3.0, 2.0, np.nan])
    assert mean.error is None  # of two runs
    assert (mean.label, mean.group, found.runs) == ("a, 3 seeds", "a, 3 seeds", {"b": 0, "a, 3 seeds": 1})
    assert (shallow.group, other.group, limit.label) == ("a, 3 seeds", "b", "limit")
    assert (null.role, null.group) == ("null", "a, 3 seeds")
    assert "of up to 2 runs" in found.caption


def test_variants_of_a_run_stay_apart_and_three_runs_have_an_interval():
    values = {"a": 1.0, "b": 2.0, "c": 6.0}
    lines = [line(name, [y, y, 10 * y], kind) for name, y in values.items() for kind in (" · up", " · down")]
    one, other = folded(figure_of(*lines), dict.fromkeys(values, "all")).lines
    assert (one.label, other.label) == ("all · up", "all · down")
    interval = scipy.stats.t.interval(0.95, 2, loc=3.0, scale=scipy.stats.sem([1.0, 2.0, 6.0]))
    assert one.error[0] == pytest.approx((interval[1] - interval[0]) / 2)
    assert one.error[2] == pytest.approx(10 * one.error[0])


def test_without_seeds_the_figure_stays_the_same():
    figure = figure_of(line("a", [1.0, 2.0, 3.0]))
    assert folded(figure, {}) is figure
    (alone,) = folded(figure, {"a": "all"}).lines
    assert (alone.label, alone.y is figure.lines[0].y) == ("all", True)
