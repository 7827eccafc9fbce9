"""How do every two depths or connections relate? One run's matrix, as a heat map."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import basis_words, constant_null, sample_words
from depthscope.app.figures.build.laws import apart
from depthscope.app.figures.build.values import fed, names_of, positions
from depthscope.app.figures.build.words import (
    counted,
    describe_matrix,
    dims_of,
    label_of,
    left_out,
    reduction_of,
)
from depthscope.app.figures.specification import Analyses, Array, Heatmap, Selection
from depthscope.app.text.numbers import number

__all__ = ["Matrix", "build_matrix"]


@dataclass(frozen=True)
class Matrix:
    """Declaration of a heat map of one variable.

    Parameters
    ----------
    name, title, z_label : str
        Register key, title and colour bar.
    metric : str
        Variable of the analysis.
    rows, columns : str
        Dimensions of the vertical and the horizontal axis.
    x_label, y_label : str
        Their labels.
    limits : tuple of (float or None) or None
        Ends of the colour scale; None at an end is the data's own, None is both.
    log_z : bool
        Logarithmic colour scale.
    below : bool
        Only what lies below the diagonal exists: a reader has nothing to read from itself or from later ones.
    error : str
        Variable that holds the standard error of every cell, where it is not ``<metric>_stderr``.
    counts : bool
        Whether the number rests on the sampled tokens, so that the caption counts them.
    note : str
        Sentence that ends the caption.
    """

    name: str
    title: str
    z_label: str
    metric: str
    rows: str
    columns: str
    x_label: str
    y_label: str
    limits: tuple[float | None, float | None] | None = None
    log_z: bool = False
    below: bool = False
    error: str = ""
    counts: bool = True
    note: str = ""

    @property
    def also(self) -> tuple[str, ...]:
        """Variables beside the metric that are told where there are some."""
        return (self.error,) if self.error else ()


def build_matrix(matrix: Matrix, analyses: Analyses, choice: Selection) -> Heatmap:
    """Heat map of one run, the selected one or the first that can feed it.

    Parameters
    ----------
    matrix : Matrix
        What to draw.
    analyses : mapping
        Run name → analysis.
    choice : Selection
        Which version of the number, and which run.

    Returns
    -------
    Heatmap

    Raises
    ------
    ValueError
        No run, or not the selected one, has the variable.
    """
    run, array = _slice(matrix, analyses, choice)
    array = array.transpose(matrix.rows, matrix.columns)
    z = np.asarray(array.values, dtype=np.float64)
    z = np.where(np.tri(z.shape[0], z.shape[1], -1, dtype=bool), z, np.nan) if matrix.below else z
    rows, columns = names_of(array, matrix.rows), names_of(array, matrix.columns)
    return Heatmap(
        name=matrix.name,
        title=matrix.title if len(analyses) == 1 else f"{matrix.title}: {run}",
        x=positions(array, matrix.columns, choice.axis),
        y=positions(array, matrix.rows, choice.axis),
        z=z,
        x_label=matrix.x_label,
        y_label=matrix.y_label,
        z_label=label_of(analyses, matrix.metric, matrix.z_label),
        limits=_limits(matrix, z),
        log_z=matrix.log_z,
        caption=_caption(matrix, analyses, choice, run),
        alt=describe_matrix(_off_diagonal(z), rows, columns, f"{matrix.title} (off the diagonal)", run),
        metric=matrix.metric,
        x_text=columns,
        y_text=rows,
    )


def _slice(matrix: Matrix, analyses: Analyses, choice: Selection) -> tuple[str, xr.DataArray]:
    """The run to show and its matrix."""
    forward = {"direction": "forward"} if choice.direction == "both" else {}
    able = {run: array for run, _, array in fed(analyses, matrix.metric, choice, **forward)}
    run = choice.run if choice.run is not None else next(iter(able), None)
    if run is None or run not in able:
        has = ", ".join(able) or "none of the runs"
        raise ValueError(f"run {run!r} has no {matrix.metric}; {has} can feed {matrix.name}")
    return run, able[run]


def _limits(matrix: Matrix, z: Array) -> tuple[float, float] | None:
    """Ends of the colour scale; widened where the data leave them, so that nothing is clipped."""
    known = z[np.isfinite(z)]
    if known.size == 0:
        return None
    lowest, highest = float(known.min()), float(known.max())
    if matrix.limits is None:
        moved = apart(lowest, highest)
        return None if moved == (lowest, highest) else moved
    low, high = matrix.limits
    return (lowest if low is None else min(low, lowest), highest if high is None else max(high, highest))


def _off_diagonal(z: Array) -> Array:
    """Square matrix with its diagonal undefined: a thing compared with itself is no finding."""
    if z.shape[0] != z.shape[1] or z.shape[0] < 2:
        return z
    masked = z.copy()
    np.fill_diagonal(masked, np.nan)
    return masked


def _caption(matrix: Matrix, analyses: Analyses, choice: Selection, run: str) -> str:
    """Reduction, count, estimator and null, and which runs cannot feed it."""
    one = {run: analyses[run]}
    dims = dims_of(one, matrix.metric)
    parts = [f"Run {run}", reduction_of(dims, choice), _direction(dims, choice)]
    if matrix.counts:
        parts.append(counted(one, choice, choice.scope if "scope" in dims else "data"))
    said = ["; ".join(part for part in parts if part) + ".", matrix.note, _error(matrix, one, choice)]
    said += [_null(matrix, one, choice), basis_words(one, matrix.metric), sample_words(one, matrix.metric)]
    able = {name for name, _, _ in fed(analyses, matrix.metric, choice, **_fixed(choice))}
    return " ".join(part for part in [*said, left_out(analyses, able)] if part)


def _fixed(choice: Selection) -> dict[str, str]:
    """A matrix shows one direction: forward where both are selected."""
    return {"direction": "forward"} if choice.direction == "both" else {}


def _direction(dims: set[str], choice: Selection) -> str:
    """Which direction the matrix shows."""
    if "direction" not in dims:
        return ""
    return "forward" if choice.direction == "both" else choice.direction


def _error(matrix: Matrix, one: Analyses, choice: Selection) -> str:
    """Sentence with the standard error of the cells, where the analysis has one."""
    name = matrix.error or f"{matrix.metric}_stderr"
    for _, _, error in fed(one, name, choice, **_fixed(choice)):
        known = _off_diagonal(np.asarray(error.values, dtype=np.float64))
        known = known[np.isfinite(known)]
        if known.size:
            return f"Standard error of a cell: {number(float(np.median(known)))}, at most {number(float(known.max()))}."
    return ""


def _null(matrix: Matrix, one: Analyses, choice: Selection) -> str:
    """Sentence with the value that independent noise of the same shape would give."""
    for _, _, null in fed(one, f"{matrix.metric}_null", choice):
        if null.ndim == 0:
            return f"Independent noise of the same shape would give {number(float(null))}."
    return constant_null(one, matrix.metric)
