"""Does any text leave its page or lie over another one? Of composed figures it is looked at where they are tested."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.text import Text

from depthscope.app.drawing.matplotlib import FIGURE_POINTS, Width, to_matplotlib
from depthscope.app.figures import Heatmap, Line, Lines
from tests.app.example_figures import MAP, X

SEEN = 0.5
"""Dots, of which an inch has 150."""


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


@pytest.mark.parametrize("width", [2.6, 3.25])
def test_labels_of_any_length_are_wrapped_to_the_figure(width, monkeypatch):
    long = "how far a token's state at this depth is turned from the one before, as a share of π"
    curves = Lines("c", "C", long, long, (Line(X, X + 1, "a", group="a"),))
    matrix = Heatmap("m", "M", X, X, X[:, None] + X, long, long, long)
    for figure in (curves, matrix):
        outside, _ = problems_of(to_matplotlib(figure, width=Width(width, FIGURE_POINTS)), monkeypatch)
        assert not outside
