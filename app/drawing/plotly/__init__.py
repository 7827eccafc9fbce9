"""How is a figure drawn on a screen? By plotly, on the same numbers that paper gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.cells import (
    FAINT,
    FONT,
    LARGEST_SIDE,
    PALETTE,
    draw_heatmap,
    log_axis,
    reduction_words,
    set_layout,
    shrink,
    words,
)
from depthscope.app.drawing.plotly.curves import draw_lines
from depthscope.app.figures import Figure, Heatmap, Lines

__all__ = ["LARGEST_SIDE", "PALETTE", "reduction_words", "shrink", "to_plotly"]


def to_plotly(figure: Figure) -> go.Figure:
    """Plotly figure of a specification; numbers stay typed arrays.

    ``figure``: What to draw. Heat maps above 300 × 300 are reduced by blocks and say so in their caption (`shrink`).

    Examples
    --------
    >>> from depthscope.app.figures import Line, Lines
    >>> line = Line(np.arange(3.0), np.array([4.0, 2.0, 1.0]), "a")
    >>> drawn = to_plotly(Lines("rank", "Rank", "depth", "rank", (line,)))
    >>> drawn.data[0].y.tolist()
    [4.0, 2.0, 1.0]
    """
    drawn = draw_lines(figure) if isinstance(figure, Lines) else draw_heatmap(shrink(figure))
    set_layout(drawn, **_layout(figure))
    if words := _why_empty(figure):
        _say_empty(drawn, words)
    return drawn


def _why_empty(figure: Figure) -> str:
    """Empty where something is drawn."""
    drawn = [line.y for line in figure.lines] if isinstance(figure, Lines) else [figure.z]
    if not any(np.isfinite(values).any() for values in drawn):
        return "undefined everywhere"
    if not isinstance(figure, Lines) or not figure.log_y or any((values > 0).any() for values in drawn):
        return ""
    return "never above 0, which a logarithmic axis cannot show"


def _say_empty(drawn: go.Figure, words: str) -> None:
    """An empty chart without a word looks as if it had failed; its ticks would be those of nothing."""
    drawn.add_annotation(text=words, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    drawn.update_xaxes(showticklabels=False)
    drawn.update_yaxes(showticklabels=False, showgrid=False)
    drawn.update_traces(showscale=False, selector={"type": "heatmap"})


def _layout(figure: Figure) -> dict[str, Any]:
    """Quiet axes on a transparent page; `uirevision` keeps zoom and hidden lines when the data change."""
    axis = {"gridcolor": FAINT, "zeroline": False, "linecolor": FAINT, "ticks": "", "automargin": True}
    x_axis = {**axis, "title": {"text": words(figure.x_label), "standoff": 6, "font": {"size": 12.5}}}
    y_axis = {**axis, "title": {"text": words(figure.y_label), "standoff": 6, "font": {"size": 12.5}}}
    if isinstance(figure, Lines):
        return _frame(figure) | {
            "xaxis": {**x_axis, "showgrid": False, **_ticks(figure)},
            "yaxis": y_axis,
            "hovermode": "x unified",
        }
    # Equal units on both axes make cells square; "domain" shrinks the drawing instead of widening the ranges.
    bare = {"showgrid": False, "showline": False}
    if not figure.square or figure.z.shape[0] != figure.z.shape[1]:
        down = {"autorange": "reversed"} if figure.from_top else {}
        return _frame(figure) | {"xaxis": x_axis | bare, "yaxis": y_axis | bare | down | _row_names(figure)}
    return _frame(figure) | {
        "xaxis": x_axis | bare | {"constrain": "domain"},
        "yaxis": y_axis | bare | {"scaleanchor": "x", "constrain": "domain"},
    }


NAMED_ROWS = 40
"""Rows of a heat map that are named at its side; with more the names run into each other."""


def _row_names(figure: Heatmap) -> dict[str, Any]:
    """Names in place of a title, whose room a phone needs for the map."""
    if figure.y_text is None or not 0 < len(figure.y_text) <= NAMED_ROWS:
        return {}
    names = [words(name, 32) for name in figure.y_text]
    return {"tickvals": list(figure.y), "ticktext": names, "tickfont": {"size": 10.5}, "title": None}


def _ticks(figure: Lines) -> dict[str, Any]:
    """Of the horizontal axis: one for every index where there are few, so that no half depth is named."""
    x = np.concatenate([line.x for line in figure.lines] or [np.zeros(1)])
    if not figure.log_x:
        return {"dtick": 1} if bool(np.all(x == np.round(x))) and 1 < x.max() <= 12 else {}
    exponents = np.log10(x[x > 0])
    return log_axis(float(exponents.min()), float(exponents.max()), 7) if exponents.size else {"type": "log"}


def _frame(figure: Figure) -> dict[str, Any]:
    return {
        "uirevision": figure.name,
        "template": "none",
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": FONT, "size": 12.5},
        "margin": {"l": 56, "r": 16, "t": 12, "b": 44},
        "legend": {
            "orientation": "h",
            "yanchor": "bottom",
            "y": 1.0,
            "xanchor": "left",
            "x": 0,
            "font": {"size": 12},
        },
        "hoverlabel": {"font": {"family": FONT, "size": 12}},
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": "rgba(128, 128, 128, 0.6)"},
    }
