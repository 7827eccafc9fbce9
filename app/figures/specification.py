"""What is a figure before it is drawn? Numbers, labels and words, the same for screen and paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from depthscope.app.figures.palette import Look, colour_numbers, look_of
from depthscope.app.text.numbers import constraint_sentence, proof_sentence
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.quantities.registry import LABELS

__all__ = [
    *("NOISE_BASELINE", "Analyses", "Array", "Figure", "FigureKind", "Heatmap", "Line", "Lines", "Selection"),
    "null_label",
]

Array = np.ndarray
Analyses = Mapping[str, xr.Dataset]
"""Run name → its analysis, in the order in which the runs are drawn."""


NOISE_BASELINE = "noise baseline"
"""What the null of a metric is called, and how the label of its line ends."""


def null_label(label: str) -> str:
    """The label of the null of a measured line."""
    return f"{label} · {NOISE_BASELINE}"


# Without `eq`, here and below: arrays compare element by element, which has no truth value.
@dataclass(frozen=True, eq=False)
class Line:
    """One curve: a measured quantity, the null of the measured line before it, or a threshold.

    ``x, y``: positions and values of equal length; NaN in `y` is a gap (undefined).
    ``label``: legend entry.
    ``role``: how it is read, hence how it is drawn: solid, dashed in the colour of the measured line, dotted grey, as single
    points.
    ``lower, upper``: uncertainty or spread around `y`.
    ``error``: half of the interval over sequences where the band is a spread; drawn as whiskers.
    ``group``: name of the run that the line belongs to; empty for thresholds.
    ``text``: name of every position (module or layer), shown on hover.
    """

    x: Array
    y: Array
    label: str
    role: Literal["measured", "null", "threshold", "mark"] = "measured"
    lower: Array | None = None
    upper: Array | None = None
    error: Array | None = None
    group: str = ""
    text: Sequence[str] | None = None

    @property
    def variant(self) -> str:
        """What distinguishes it from other lines of its run; empty for the plain one."""
        return self.label.removeprefix(self.group).removeprefix(" · ")


@dataclass(frozen=True, eq=False)
class Lines:
    """Curves over one axis, with an optional healthy band.

    ``sources`` are the bibliography keys of the laws of the nulls that are drawn. ``runs`` are all runs that are shown
    together, those that this figure lacks included, with the numbers of their colours in `palette`.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_y: bool = False
    log_x: bool = False
    healthy: tuple[float, float] | None = None
    caption: str = ""
    alt: str = ""
    metric: str = ""
    sources: tuple[str, ...] = ()
    runs: Mapping[str, int] = field(default_factory=dict)

    def of(self, *roles: str) -> list[Line]:
        """The lines that have one of some roles."""
        return [line for line in self.lines if line.role in roles]

    def numbers(self, *roles: str) -> np.ndarray:
        """Every finite number of the lines of some roles and of their bands."""
        parts = [
            part for line in self.of(*roles) for part in (line.y, line.lower, line.upper) if part is not None
        ]
        values = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts] or [np.zeros(0)])
        return values[np.isfinite(values)]


@dataclass(frozen=True, eq=False)
class Heatmap:
    """A matrix of one run over two axes; `z` has one row for each entry of `y`, one column for each of `x`.

    `square` is whether both axes count the same, such as depths: cells are squares then, else they fill the frame.
    Where there are more cells than a screen needs, neighbours are drawn as one, by their mean or by the largest; along an axis
    that is ``categorical``, such as modules or the cells of a matrix, neighbours have nothing in common and are not joined.
    ``printed`` writes the number of every cell, with the sum of each row and column at the edge.
    ``from_top``: the first row is the topmost one. ``named_only``: the mouse tells the names of a cell, not its positions.
    """

    name: str
    title: str
    x: Array
    y: Array
    z: Array
    x_label: str
    y_label: str
    z_label: str
    limits: tuple[float, float] | None = None
    diverging: bool = False
    log_z: bool = False
    caption: str = ""
    alt: str = ""
    metric: str = ""
    x_text: Sequence[str] | None = None
    y_text: Sequence[str] | None = None
    sources: tuple[str, ...] = ()
    run: str = ""
    square: bool = True
    printed: bool = False
    categorical: tuple[Literal["x", "y"], ...] = ()
    of_block: Literal["mean", "largest"] = "mean"
    from_top: bool = False
    named_only: bool = False


Figure = Lines | Heatmap


def looks_of(figure: Lines) -> dict[int, Look]:
    """How every measured line of a figure is drawn."""
    measured = figure.of("measured")
    # With runs that this figure lacks: the others keep their colours. A mean over seeds has a name of its own.
    numbers = dict(figure.runs)
    for line in measured:
        if line.group not in numbers:
            numbers[line.group] = next(number for number in count() if number not in numbers.values())
    if len(numbers) < 2:
        first = next(iter(numbers.values()), 0)
        return {id(line): look_of(first + place) for place, line in enumerate(measured)}
    num_drawn = dict.fromkeys(numbers, 0)
    looks = {}
    for line in measured:
        looks[id(line)] = look_of(numbers[line.group], num_drawn[line.group])
        num_drawn[line.group] += 1
    return looks


@dataclass(frozen=True)
class Selection:
    """Which of the many versions of a number a figure shows.

    ``scope``, ``tokens``, ``centering``, ``stream``, ``estimator``, ``direction``, ``reduction``: Labels of the
    analysis' dimensions of the same names; `direction="both"` overlays forward and backward, `stream="each"` overlays
    every stream.
    ``axis``: Depth index, or depth divided by the depth of the run, for runs of different depth.
    ``step``: Training step; None is the last one.
    ``run``: The run that a heat map shows; None is the first one that can feed it.
    ``depths``: Depths whose spectra are shown; None is five from the first to the last.
    """

    scope: str = "sequence"
    tokens: str = "all"
    centering: str = "raw"
    stream: str = "mean"
    estimator: str = "unbiased"
    direction: str = "both"
    reduction: str = "mean"
    axis: str = "depth"
    step: int | None = None
    run: str | None = None
    depths: tuple[int, ...] | None = None

    @classmethod
    def of(cls, choices: Mapping[str, Any]) -> Selection:
        """Selection from keyword choices, refusing names and labels that do not exist.

        Raises InputError: A field or a label that is not one of `CHOICES`.
        """
        # Checked here once for the command line, the dashboard and Python: a wrong label would otherwise select no numbers,
        # and the figure would look as if the run had none.
        known = [f.name for f in fields(cls)]
        for name, value in choices.items():
            if name not in known:
                raise InputError(f"no selection {name!r}; expected one of {', '.join(known)}")
            # Streams, steps, runs and depths are those of the data: any value is taken.
            options = CHOICES.get(name)
            if options and value not in options:
                raise InputError(f"{name}={value!r}; expected one of {', '.join(options)}")
        return cls(**choices)


CHOICES: dict[str, tuple[str, ...]] = {
    **{dim: LABELS[dim] for dim in ("scope", "tokens", "centering", "estimator")},
    # "both" is a choice of figures alone: analyses have the two directions.
    "direction": ("both", *LABELS["direction"]),
    "reduction": LABELS["reduction"],
    "axis": ("depth", "relative"),
}
"""The labels that a selection may take; streams, steps and runs depend on the data."""


@dataclass(frozen=True)
class FigureKind(ABC):
    """A definition of a figure: of which metric, and under which title; a subclass knows how to draw it.

    ``name``: Register key, also the file name in an export.
    ``title``: Title that stands alone.
    ``question``: collapse, similarity, mixing or gradients: the heading in a report.
    ``metric``: Metric of the catalogue without which there is nothing to draw; the one called `name` by default.
    """

    name: str
    title: str
    question: str = field(kw_only=True)
    metric: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        # Frozen: the default depends on another field, which `field(default=…)` cannot express.
        if not self.metric:
            object.__setattr__(self, "metric", self.name)

    @property
    def needs(self) -> tuple[str, ...]:
        """Variables of the analysis without which there is nothing to draw."""
        return (self.metric,)

    @property
    def also(self) -> tuple[str, ...]:
        """Further variables that it draws where the analysis has them, such as a band."""
        return ()

    @property
    @abstractmethod
    def uses(self) -> tuple[str, ...]:
        """The fields of `Selection` that change it."""

    @abstractmethod
    def figure(self, analyses: Analyses, choice: Selection) -> Figure:
        """The figure of some runs."""

    def build(self, analyses: Analyses, **selection: Any) -> Figure:
        """The figure of some runs, by keywords."""
        figure = self.figure(analyses, Selection.of(selection))
        if isinstance(figure, Lines):
            figure = replace(figure, runs=colour_numbers(analyses))
        # Here and in no figure's own caption: no figure of an unproven reading can be drawn without it.
        sentences = [figure.caption, *self._evidence(analyses, figure)]
        return replace(figure, caption=" ".join(filter(None, sentences)))

    def _evidence(self, analyses: Analyses, figure: Figure) -> tuple[str, str]:
        """What the caption tells of the evidence: unproven readings, and of mixing what the matrices satisfy."""
        shown = [figure.run] if isinstance(figure, Heatmap) and figure.run in analyses else list(analyses)
        attrs = {run: analyses[run].attrs for run in shown}
        return constraint_sentence(attrs) if self.question == "mixing" else "", proof_sentence(attrs)


def figure_table(figure: Figure) -> pd.DataFrame:
    """A row for every point of every line, or a row for every row of a matrix.

    ``figure``: any figure; of a heat map every cell, also where the screen shows block means.
    Returns: Of lines: line, role, x, where, y, lower, upper. Of a matrix: y, where, then a column for every x, under
    its number. NaN is undefined.
    """
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
