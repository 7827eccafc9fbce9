"""How is a history drawn? A curve or a map over steps, and what one step looks like along depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from depthscope.app.figures.build.bins import Bins
from depthscope.app.figures.build.values import names_of
from depthscope.app.figures.specification import Figure, Heatmap, Line, Lines
from depthscope.app.readings.training_history import CELLS, DRIFT, Measure, TrainingHistory
from depthscope.app.text.visible import LONGEST_NAME, visible
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

__all__ = ["history_figure", "measure_title", "profile_figure", "row_names"]

TITLES = {
    CELLS: "Elements of H_res, H_pre and H_post, mean over tokens",
    DRIFT: "Drift of the connections' parameters since the first step",
    "loss": "Loss",
    "learning_rate": "Learning rate",
}

MOST_COLUMNS = 400
"""Of a map: about one for every two pixels of a screen. A heuristic of ours."""


def measure_title(measure: Measure) -> str:
    """What a measure is called."""
    known = CATALOGUE.get(measure.name)
    return known.title if known is not None else TITLES.get(measure.name, measure.name.replace("_", " "))


def row_names(measure: Measure) -> list[str]:
    """What people call each row of a measure."""
    if measure.rows in ("depth", "connection", "weight"):
        return names_of(measure.sample, measure.rows)
    return [visible(label, longest=LONGEST_NAME) for label in measure.sample[measure.rows].values]


def history_figure(
    history: TrainingHistory, name: str, choice: Mapping[str, str], span: tuple[float, float] | None = None
) -> Figure:
    """A measure over steps: a curve, or a map with a row for each depth, connection or module.

    ``span``: the steps from and to which it is shown; None for all.
    Returns: Where there are more steps than columns, each column has the extremes of its steps, and the caption says
    so.
    """
    measure = history.measures[name]
    steps = history.steps
    shown = slice(0, len(steps))
    if span is not None:
        # One step more on both sides, so that a curve goes on to the edge.
        first, last = np.searchsorted(steps, span, side="left")
        shown = slice(max(int(first) - 1, 0), int(last) + 1)
    values = history.values(name, choice)[shown]
    bins = Bins.of(steps[shown], MOST_COLUMNS)
    words = ", ".join(
        f"{dim} {label}" for dim, label in measure.labels(choice).items() if len(measure.choices[dim]) > 1
    )
    # Above so low a panel there is no room for more than the short name.
    known = CATALOGUE.get(name)
    short = measure_title(measure) if known is None else known.label
    title = f"{short[:1].upper()}{short[1:]}" + (f" ({words})" if words else "")
    if not measure.rows:
        x, y = bins.curve(values)
        return Lines(
            name,
            title,
            "step",
            "",
            (Line(x, y, title, group=history.name),),
            log_y=name == "learning_rate" and bool((values > 0).any()),
            caption=_reduction(bins, "the least and the greatest number of every {} steps are drawn"),
        )
    is_log = _is_log(name, values)
    cells = bins.most_unusual(values, log=is_log)
    return Heatmap(
        name,
        title,
        bins.centres,
        np.arange(values.shape[1]),
        cells.T,
        "step",
        measure.rows,
        "",
        limits=_limits(cells, is_log),
        log_z=is_log,
        y_text=row_names(measure),
        caption=_reduction(bins, "a column is the most unusual of {} steps"),
        run=history.name,
    )


def _reduction(bins: Bins, words: str) -> str:
    return words.format(bins.largest) if bins.largest > 1 else ""


def _is_log(name: str, values: np.ndarray) -> bool:
    known = CATALOGUE.get(name)
    if not (name == DRIFT or (known is not None and known.scale == "log")):
        return False
    positive = values[values > 0]
    return positive.size > 0 and float(positive.max()) > 3 * float(positive.min())


def _limits(cells: np.ndarray, is_log: bool) -> tuple[float, float] | None:
    known = cells[np.isfinite(cells) & ((cells > 0) | (not is_log))]
    return (float(known.min()), float(known.max())) if known.size and known.max() > known.min() else None


def profile_figure(
    history: TrainingHistory, name: str, choice: Mapping[str, str], positions: Sequence[int]
) -> Lines:
    """A measure along depth at some steps, with its null.

    ``name``: one of its measures that has rows.
    """
    measure = history.measures[name]
    values = history.values(name, choice)
    names = row_names(measure)
    x = np.arange(values.shape[1], dtype=float)
    labelled = [
        (position, f"step {int(history.steps[position]):,}".replace(",", " ")) for position in positions
    ]
    lines = [
        Line(x, np.asarray(values[position], dtype=float), label, group=label, text=names)
        for position, label in labelled
    ]
    null = _null_of(history, measure, choice)
    if null is not None:
        lines.append(Line(x, np.full(len(x), null), "null", role="null", group=lines[-1].group))
    title = measure_title(measure)
    return Lines(
        f"{name}_at_step",
        title,
        measure.rows,
        "",
        tuple(lines),
        log_y=_is_log(name, values[list(positions)]),
        alt=f"{title} of {history.name} by {measure.rows}, at {' and '.join(label for _, label in labelled)}.",
    )


def _null_of(history: TrainingHistory, measure: Measure, choice: Mapping[str, str]) -> float | None:
    null: xr.DataArray | None = history.analysis_at(-1).get(f"{measure.name}_null")
    if null is None:
        constant = CATALOGUE[measure.name].null if measure.name in CATALOGUE else None
        return float(constant) if isinstance(constant, (int, float)) else None
    labels = measure.labels(choice)
    chosen = null.sel({dim: labels[str(dim)] for dim in null.dims if str(dim) in labels})
    return float(chosen) if not chosen.dims else None
