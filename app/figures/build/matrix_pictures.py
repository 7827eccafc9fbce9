"""What does H_res look like at every depth? Its matrices as small pictures side by side, on one scale, with their sums.

Sums are shown as their distance from 1: what is equal in all streams is kept where they are 1, and there the edge is blank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from depthscope.app.figures.specification import Heatmap
from depthscope.app.text.numbers import number

APART, SUM = 1, 1
"""Cells between a matrix and its sums and after them, and of the sums."""

MOST_COLUMNS = 300
"""Of cells: with more, one has less than three pixels of a page, and what is seen is the raster of the screen."""


def picture_figure(
    matrices: Sequence[np.ndarray],
    names: Sequence[str],
    places: Sequence[float],
    num_places: int,
    *,
    name: str,
    title: str,
    run: str,
    x_label: str,
    of: str,
) -> Heatmap:
    """Matrices of streams × streams over one axis: targets are rows, the first one on top, sources are columns.

    Below each matrix are its column sums − 1, at its right its row sums − 1.

    ``names, places``: of each matrix, and its position on the axis, which counts the ``num_places`` from 0. Of several
    matrices at one place the last is shown.
    ``of``: whose the matrices are, such as the mean over tokens.
    """
    n = len(matrices[0])
    side = n + APART + SUM
    wide = side + APART
    # With too many places one matrix is drawn for several: the last one, so that what comes of all is among them.
    every = -(-num_places // max(MOST_COLUMNS // wide, 1))
    shown = {round(place) // every: number for number, place in enumerate(places)}
    z = np.full((side, -(-num_places // every) * wide), np.nan)
    columns = [""] * z.shape[1]
    for group, number_of in shown.items():
        matrix, words, start = matrices[number_of], names[number_of], group * wide
        z[:n, start : start + n] = matrix
        z[:n, start + n + APART] = matrix.sum(axis=1) - 1
        z[n + APART, start : start + n] = matrix.sum(axis=0) - 1
        columns[start : start + n] = [f"{words}, from {source}" for source in range(n)]
        columns[start + n + APART] = f"{words}, row sum − 1"
    known = z[np.isfinite(z)]
    reach = max(float(np.abs(known).max()) if known.size else 1.0, 1e-12)
    ends = (
        f"from {number(float(np.min(matrices)))} to {number(float(np.max(matrices)))}"
        if np.isfinite(matrices).all()
        else "some of them undefined, which are gaps"
    )
    words = (
        f"Run {run}, {of}: entries {ends}, all on one scale. Rows are targets, columns sources; at the right row sums − 1, "
        f"below column sums − 1. 1/n = {number(1 / n)} everywhere is uniform mixing."
    )
    return Heatmap(
        name=name,
        title=f"{title} (1 of every {every})" if every > 1 else title,
        x=every * (np.arange(z.shape[1]) + 0.5) / wide - 0.5,
        y=np.arange(side, dtype=float),
        z=z,
        x_label=x_label,
        y_label="to stream",
        z_label="",
        limits=(-reach, reach),
        diverging=True,
        caption=words,
        alt=f"{title}: {len(matrices)} matrices of {n} × {n} streams, {len(shown)} of them shown. {words}",
        x_text=columns,
        y_text=[*(f"to {target}" for target in range(n)), "", "sum − 1"],
        run=run,
        square=False,
        categorical=("x", "y"),
        from_top=True,
        named_only=True,
    )
