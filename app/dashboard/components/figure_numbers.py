"""Which numbers does a figure show? Its table, under the names that the figure gives its axes."""

from __future__ import annotations

import pandas as pd

from depthscope.app.figures import Figure, Heatmap
from depthscope.app.figures.numbers import figure_table

__all__ = ["numbers_of"]


def numbers_of(figure: Figure) -> pd.DataFrame:
    """Table of a figure's numbers, as shown and as downloaded.

    ``figure``: any figure; a heat map gives every cell, reduced or not.
    """
    table = figure_table(figure)
    if isinstance(figure, Heatmap):
        # One heading for the column of rows, at the corner of both axes: names of columns are positions.
        corner = f"{figure.y_label} ↓ / {figure.x_label} →"
        return table.rename(columns=lambda x: x if isinstance(x, str) else f"{x:.4g}").rename(
            columns={"y": corner}
        )
    shown = table[["line", "x", "where", "y", "lower", "upper", "role"]]
    return shown.rename(columns={"x": figure.x_label, "y": figure.y_label})
