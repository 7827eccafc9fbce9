"""How do every two depths or connections relate? One run's matrix, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from depthscope.app.figures.build.bins import visible_limits
from depthscope.app.figures.build.measurement import Measurement, describe_matrix, selection_words
from depthscope.app.figures.build.values import LABELLED, fed, names_of, positions
from depthscope.app.figures.specification import Analyses, Array, FigureKind, Heatmap, Selection
from depthscope.app.text.numbers import number, sentence
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

ORDERED = ("depth", "connection", "order", "component")
"""Axes along which neighbours may be drawn as one; heads and modules are names."""


@dataclass(frozen=True)
class MatrixFigure(FigureKind):
    """A heat map of one metric of one run; the scale of its colours is that of the metric's declaration.

    ``z_label``: Colour bar.
    ``rows``, ``columns``: Dimensions of the vertical and the horizontal axis.
    ``x_label``, ``y_label``: Their labels; the name of the dimension, without ``other_``, by default.
    ``limits``: Ends of the colour scale; None at an end is the data's own, None is both.
    ``below``: Only what is below the diagonal exists: a reader has nothing to read from itself or from later ones.
    ``note``: Sentence of the caption.
    """

    z_label: str
    rows: str = "depth"
    columns: str = "other_depth"
    x_label: str = ""
    y_label: str = ""
    limits: tuple[float | None, float | None] | None = None
    below: bool = False
    note: str = ""

    @property
    def uses(self) -> tuple[str, ...]:
        """The selected labels among the dims of the metric, the axis, the step and the run."""
        dims = CATALOGUE[self.metric].dims
        return (*(dim for dim in LABELLED if dim in dims), "axis", "step", "run")

    def figure(self, analyses: Analyses, choice: Selection) -> Heatmap:
        """The matrix of one run, the selected one or the first that can feed it."""
        measurement = Measurement(self.metric, analyses, choice)
        # Slices, not variables: a run that has the metric under other labels cannot feed this selection.
        able = {run: array for run, _, array in measurement.slices()}
        run = choice.run if choice.run is not None else next(iter(able), None)
        if run is None or run not in able:
            has = ", ".join(able) or "none of the runs"
            raise InputError(f"run {run!r} has no {self.metric}; {has} can feed {self.name}")
        array = able[run].transpose(self.rows, self.columns)
        z = np.asarray(array.values, dtype=np.float64)
        # What cannot exist is undefined (grey), not a measured zero.
        if self.below:
            z = np.where(np.tri(len(z), z.shape[1], -1, dtype=bool), z, np.nan)
        rows, columns = names_of(array, self.rows), names_of(array, self.columns)
        bases: dict[Literal["x", "y"], str] = {
            "x": self.columns.removeprefix("other_"),
            "y": self.rows.removeprefix("other_"),
        }
        return Heatmap(
            name=self.name,
            # Of several runs the matrix is of one: which the title names.
            title=self.title if len(analyses) == 1 else f"{self.title}: {run}",
            x=positions(array, self.columns, choice.axis),
            y=positions(array, self.rows, choice.axis),
            z=z,
            x_label=self.x_label or bases["x"],
            y_label=self.y_label or bases["y"],
            z_label=measurement.axis_label(self.z_label),
            limits=self._colour_limits(z),
            log_z=CATALOGUE[self.metric].scale == "log",
            caption=self._caption(measurement, run, set(able)),
            # Without the diagonal, whose extremes (1 or 0 with itself) would be the only ones named.
            alt=describe_matrix(
                _off_diagonal(z), rows, columns, title=f"{self.title} (off the diagonal)", run=run
            ),
            metric=self.metric,
            x_text=columns,
            y_text=rows,
            run=run,
            square=bases["x"] == bases["y"],
            categorical=tuple(axis for axis, base in bases.items() if base not in ORDERED),
        )

    def _colour_limits(self, z: Array) -> tuple[float, float] | None:
        """Ends of the colour scale; widened where the data exceed them, so that nothing is clipped."""
        known = z[np.isfinite(z)]
        if known.size == 0:
            return None
        lowest, highest = float(known.min()), float(known.max())
        if self.limits is None:
            # None leaves the ends to the drawing; only a nearly constant matrix needs other ones.
            visible = visible_limits(lowest, highest)
            return None if visible == (lowest, highest) else visible
        low, high = self.limits
        return lowest if low is None else min(low, lowest), highest if high is None else max(high, highest)

    def _caption(self, measurement: Measurement, run: str, able: set[str]) -> str:
        """Selection and count, error of a cell and null, and which runs cannot feed it."""
        one = measurement.of([run])
        direction = one.choice.direction.replace("both", "forward") if "direction" in one.dims else ""
        parts = [
            sentence(
                [f"Run {run}", selection_words(one.dims, one.choice), direction, one.token_words("data")]
            ),
            self.note,
            self._error_words(one),
            _null_words(one),
            one.basis_words(),
            one.sample_words(),
            measurement.missing_words(able),
        ]
        return " ".join(part for part in parts if part)

    def _error_words(self, one: Measurement) -> str:
        """Sentence with the standard error of the cells, where the analysis has one."""
        for _, _, error in fed(one.analyses, f"{self.metric}_stderr", one.choice):
            known = _off_diagonal(np.asarray(error.values, dtype=np.float64))
            known = known[np.isfinite(known)]
            if known.size:
                # A cell has no room for whiskers.
                typical, largest = number(float(np.median(known))), number(float(known.max()))
                return f"Standard error of a cell: {typical}, at most {largest}."
        return ""


def _null_words(one: Measurement) -> str:
    """Sentence with the value that independent noise of the same shape would give."""
    for _, _, null in fed(one.analyses, f"{one.metric}_null", one.choice):
        # One number for all cells; a null that varies over cells has no place in a sentence.
        if null.ndim == 0:
            return f"Independent noise of the same shape would give {number(float(null))}."
    return one.constant_null_words()


def _off_diagonal(z: Array) -> Array:
    """Square matrix with its diagonal undefined: a state compared with itself is no finding."""
    # Of a single cell the diagonal is all there is.
    if z.shape[0] != z.shape[1] or z.shape[0] < 2:
        return z
    masked = z.copy()
    np.fill_diagonal(masked, np.nan)
    return masked


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
