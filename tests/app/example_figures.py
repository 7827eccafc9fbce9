"""Curves of every role and a matrix, for the tests that draw and write figures."""

from __future__ import annotations

import numpy as np

from depthscope.app.figures import Heatmap, Line, Lines

X = np.arange(8.0)
CURVES = Lines(
    name="curves",
    title="Curves",
    x_label="depth",
    y_label="gain",
    lines=(
        Line(X, np.exp(X), "a", lower=np.exp(X) * 0.9, upper=np.exp(X) * 1.1, group="a"),
        Line(X, np.full(8, 3.0), "a · noise baseline", role="null", group="a"),
        Line(X, np.where(X == 2, np.nan, X + 1), "cost $5_a", group="b"),
        Line(X[[0, -1]], np.full(2, 10.0), "warn: 10", role="threshold"),
        Line(X[[0, -1]], np.full(2, 1e9), "far: 1e9", role="threshold"),
    ),
    log_y=True,
    healthy=(0.5, 10.0),
)
MAP = Heatmap("map", "Map", X, X[:5], np.outer(X[:5], X) - 9.0, "x", "y", "z", diverging=True)
