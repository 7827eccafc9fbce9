"""Are seeds drawn as their mean in a band, and is nothing else put together?"""

import numpy as np

from depthscope.app.figures import Line, Lines
from depthscope.app.figures.build.folded_runs import folded

X = np.arange(3.0)


def line(group, y, **more):
    return Line(X[: len(y)], np.array(y), f"{group}{more.pop('variant', '')}", group=group, **more)


def test_seeds_become_a_mean_with_a_band_and_others_stay():
    figure = Lines(
        "rank",
        "Rank",
        "depth",
        "rank",
        (
            line("a0", [1.0, 2.0, np.nan]),
            line("a0", [9.0, 9.0, 9.0], role="null"),
            line("a1", [3.0, np.nan, np.nan]),
            line("b", [5.0, 5.0, 5.0]),
            line("a2", [4.0, 4.0]),  # of another depth
            Line(X, np.full(3, 1.0), "limit", role="threshold"),
        ),
    )
    found = folded(figure, dict.fromkeys(("a0", "a1", "a2"), "a0 and 2 more seeds"))
    mean, shallow, other, limit = found.lines
    np.testing.assert_array_equal(mean.y, [2.0, 2.0, np.nan])
    np.testing.assert_array_equal(mean.lower, [1.0, 2.0, np.nan])
    np.testing.assert_array_equal(mean.upper, [3.0, 2.0, np.nan])
    assert (mean.label, mean.group) == ("a0 and 2 more seeds", "a0")
    assert (shallow.group, other.group, limit.label) == ("a2", "b", "limit")
    assert "of up to 2 seeds" in found.caption


def test_without_seeds_the_figure_stays_the_same():
    figure = Lines("rank", "Rank", "depth", "rank", (line("a", [1.0, 2.0, 3.0]),))
    assert folded(figure, {}) is figure
    assert folded(figure, {"a": "a"}) is figure
