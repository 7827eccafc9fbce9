"""Which numbers does a figure draw? The same table on the screen, in a download and in an export."""

from __future__ import annotations

import numpy as np
import pandas as pd

from depthscope.app.figures.composed.specification import Points
from depthscope.app.figures.specification import NOISE_BASELINE, Figure, Heatmap, Line


def figure_table(figure: Figure | Points) -> pd.DataFrame:
    """A row for every point of every line, or a row for every row of a matrix.

    ``figure``: any figure; of a heat map every cell, also where the screen shows block means.
    Returns: Of lines: line, role, x, where, y, lower, upper. Of a matrix: y, where, then a column for every x, under
    its number. Of points: run, real, imaginary. NaN is undefined.
    """
    if isinstance(figure, Points):
        runs = [np.full(values.size, run, dtype=object) for run, values in figure.points.items()]
        flat = np.concatenate([np.ravel(values) for values in figure.points.values()])
        return pd.DataFrame({"run": np.concatenate(runs), "real": flat.real, "imaginary": flat.imag})
    if isinstance(figure, Heatmap):
        # Wide, as the matrix is drawn: one row per cell would repeat both positions in every row.
        table = pd.DataFrame(figure.z, columns=figure.x)
        table.insert(0, "y", figure.y)
        table.insert(1, "where", figure.y_text if figure.y_text is not None else "")
        return table
    # pandas refuses to concatenate nothing, and an empty figure still has a table with these columns.
    points = [_points(line) for line in figure.lines]
    return pd.concat(points, ignore_index=True) if points else _points(Line(np.zeros(0), np.zeros(0), ""))


def _points(line: Line) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "line": line.label,
            "role": NOISE_BASELINE if line.role == "null" else line.role,
            "x": line.x,
            "where": line.text if line.text is not None else "",
            "y": line.y,
            "lower": line.lower if line.lower is not None else np.nan,
            "upper": line.upper if line.upper is not None else np.nan,
        }
    )
