"""Does any text leave its page or lie over another one: in every composed figure of three runs?"""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.text import Text

from depthscope.app.drawing.matplotlib import FIGURE_POINTS, Width, draw_composed, figure_style, to_matplotlib
from depthscope.app.figures import Heatmap, Line, Lines
from depthscope.app.figures.composed import QUESTIONS, compose
from depthscope.app.readings.readings import read_runs
from depthscope.app.text.venues import VENUES
from tests.app.example_figures import MAP, X

NAMES = ("plain", "hc-1e-3", "mhc-seed-0-with-a-long-name")
NARROWEST = "neurips"
SEEN = 0.5
"""Dots, of which an inch has 150."""


@pytest.fixture(scope="module")
def runs(make_run):
    families = ("residual", "hc", "mhc")
    return {
        name: make_run(family, layers=2, samples=3, seed=place)
        for place, (name, family) in enumerate(zip(NAMES, families, strict=True))
    }


def texts_of(canvas, monkeypatch):
    """Every text that is drawn, with its box after the layout."""
    found = []
    draw = Text.draw

    def recorded(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer)))
        return draw(self, renderer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", recorded)
        canvas.draw_without_rendering()
    return found


def problems_of(canvas, monkeypatch):
    texts = texts_of(canvas, monkeypatch)
    assert texts
    page = canvas.bbox
    outside = [
        text
        for text, box in texts
        if min(box.x0, box.y0) < -SEEN or box.x1 > page.width + SEEN or box.y1 > page.height + SEEN
    ]
    # A dot and a half: the boxes of letters are a little higher than their ink.
    covered = [
        (one, other)
        for (one, a), (other, b) in combinations(texts, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5
    ]
    return outside, covered


def test_a_text_beyond_the_page_is_noticed(monkeypatch):
    canvas = to_matplotlib(MAP)
    canvas.draw_without_rendering()
    canvas.axes[0].xaxis.label.set_text("a label that is longer than its figure " * 3)
    assert problems_of(canvas, monkeypatch)[0]


def test_no_text_of_a_composed_figure_leaves_the_page(runs, monkeypatch):
    drawn, readings = 0, read_runs(runs)
    for name in QUESTIONS:
        figure = compose(name, readings, runs=runs)
        if not figure.panels:
            continue
        with figure_style(Width(VENUES[NARROWEST].text, FIGURE_POINTS)) as size:
            canvas = draw_composed(figure, size)
        drawn += 1
        assert problems_of(canvas, monkeypatch) == ([], []), name
    assert drawn >= 6


@pytest.mark.parametrize("width", [2.6, 3.25])
def test_labels_of_any_length_are_wrapped_to_the_figure(width, monkeypatch):
    long = "how far a token's state at this depth is turned from the one before, as a share of π"
    curves = Lines("c", "C", long, long, (Line(X, X + 1, "a", group="a"),))
    matrix = Heatmap("m", "M", X, X, X[:, None] + X, long, long, long)
    for figure in (curves, matrix):
        outside, _ = problems_of(to_matplotlib(figure, width=Width(width, FIGURE_POINTS)), monkeypatch)
        assert not outside
