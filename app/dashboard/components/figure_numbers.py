"""Which numbers are behind a figure? A table with a row for every point or a row for every line of cells."""

from __future__ import annotations

import numpy as np
import pandas as pd

from depthscope.app.figures import Figure, Heatmap, Line, Lines

__all__ = ["numbers_of"]


def numbers_of(figure: Figure) -> pd.DataFrame:
    """Table of a figure's numbers, as shown and as downloaded.

    Parameters
    ----------
    figure : Lines or Heatmap
        Any figure; a heat map gives every cell, reduced or not.

    Returns
    -------
    pandas.DataFrame
    """
    return _of_matrix(figure) if isinstance(figure, Heatmap) else _of_lines(figure)


def _of_lines(figure: Lines) -> pd.DataFrame:
    rows = [_of_line(line, figure) for line in figure.lines]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _of_line(line: Line, figure: Lines) -> pd.DataFrame:
    count = len(line.x)
    undefined = np.full(count, np.nan)
    return pd.DataFrame(
        {
            "line": line.label,
            figure.x_label: line.x,
            "where": [""] * count if line.text is None else list(line.text),
            figure.y_label: line.y,
            "lower": undefined if line.lower is None else line.lower,
            "upper": undefined if line.upper is None else line.upper,
            "role": line.role,
        }
    )


def _of_matrix(figure: Heatmap) -> pd.DataFrame:
    columns = [f"{x:.4g}" for x in figure.x]
    names = [""] * len(figure.y) if figure.y_text is None else list(figure.y_text)
    table = pd.DataFrame(figure.z, columns=columns)
    table.insert(0, f"{figure.y_label} ↓ / {figure.x_label} →", figure.y)
    table.insert(1, "where", names)
    return table
