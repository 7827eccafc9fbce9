"""Are curves divided by their own nulls, and left alone where it is not clear which one that is?"""

import numpy as np

from depthscope.app.figures import Line, Lines
from depthscope.app.figures.build.share import share_of_null

X = np.arange(3.0)


def lines(*drawn: Line) -> Lines:
    return Lines(
        "rank", "Rank", "depth", "rank", drawn, healthy=(1.0, 2.0), caption="Words.", metric="effective_rank"
    )


def test_values_bands_and_whiskers_are_shares_of_the_null():
    measured = Line(X, np.array([2.0, 4.0, np.nan]), "a", lower=X, upper=X + 4, error=np.ones(3), group="a")
    null = Line(X, np.array([4.0, 8.0, 0.0]), "a · noise baseline", role="null", group="a")
    threshold = Line(X, X, "bad", role="threshold")
    figure = share_of_null(lines(measured, null, threshold))
    drawn, one = figure.lines
    np.testing.assert_allclose(drawn.y, [0.5, 0.5, np.nan])
    np.testing.assert_allclose(drawn.lower, [0.0, 0.125, np.nan])
    np.testing.assert_allclose(drawn.error, [0.25, 0.125, np.nan])
    assert (one.role, one.y.tolist()) == ("threshold", [1.0, 1.0])
    assert figure.healthy is None
    assert "Divided by the noise baseline" in figure.caption


def test_streams_share_the_null_of_their_run_and_runs_do_not_share_theirs():
    first = Line(X, X + 1, "a · 0", group="a")
    second = Line(X, X + 2, "a · 1", group="a")
    null = Line(X, np.full(3, 2.0), "a · 0 · noise baseline", role="null", group="a")
    figure = share_of_null(lines(first, null, second))
    np.testing.assert_allclose(figure.lines[1].y, (X + 2) / 2)
    other = Line(X, X, "b", group="b")
    assert share_of_null(lines(first, null, other)).lines == (first, null, other)


def test_a_null_at_other_places_divides_nothing():
    measured = Line(X, X, "a", group="a")
    null = Line(X + 0.5, X + 1, "a · noise baseline", role="null", group="a")
    assert share_of_null(lines(measured, null)).lines == (measured, null)
