"""How is a history drawn? A curve or a map over steps, and what one step looks like along depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from depthscope.app.figures.build.bins import Bins
from depthscope.app.figures.build.values import folded, names_of
from depthscope.app.figures.specification import NOISE_BASELINE, Figure, Heatmap, Line, Lines
from depthscope.app.readings.training_history import Measure, TrainingHistory
from depthscope.app.text.visible import LONGEST_NAME, visible
from depthscope.diagnostics.analysis.training_curves import DRIFT
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

TITLES = {
    DRIFT: "Drift of the connections' parameters since the first step",
    "loss": "Loss",
    "learning_rate": "Learning rate",
}

MOST_COLUMNS = 400
"""Of a map: about one for every two pixels of a screen. A heuristic of ours."""

LABEL_WORDS = {
    "tokens": "{} tokens",
    "centering": "{}",
    "direction": "{}",
    "stream": "stream {}",
    "reduction": "{} over tokens",
}
"""How the label of a dim is written in a title."""


def measure_title(measure: Measure) -> str:
    """What a measure is called, in few enough words for a low panel."""
    known = CATALOGUE.get(measure.name)
    title = known.label if known is not None else TITLES.get(measure.name, measure.name.replace("_", " "))
    return f"{title[:1].upper()}{title[1:]}"


def _title_in_full(measure: Measure, choice: Mapping[str, str], *more: str) -> str:
    """The title with the labels that were chosen, where there was a choice."""
    chosen = [
        LABEL_WORDS.get(dim, f"{dim} {{}}").format(label)
        for dim, label in measure.labels(choice).items()
        if len(measure.choices[dim]) > 1
    ]
    words = ", ".join([*more, *chosen])
    return measure_title(measure) + (f" ({words})" if words else "")


def row_names(measure: Measure) -> list[str]:
    """What people call each row of a measure."""
    if measure.rows in ("depth", "connection", "weight"):
        return names_of(measure.sample, measure.rows)
    return [visible(label, longest=LONGEST_NAME) for label in measure.sample[measure.rows].values]


def history_figure(
    history: TrainingHistory, name: str, choice: Mapping[str, str], span: tuple[float, float] | None = None
) -> Figure:
    """A measure over steps: a curve, or a map with a row per depth, connection or module.

    ``span``: the steps from and to which it is shown; None for all.
    Returns: Where there are more steps than columns, each column has the extremes of its steps, and the caption says
    so.
    """
    measure = history.measures[name]
    shown = _steps_in(history.steps, span)
    values = history.values(name, choice)[shown]
    bins = Bins.of(history.steps[shown], MOST_COLUMNS)
    title = _title_in_full(measure, choice)
    if not measure.rows:
        return Lines(
            name,
            title,
            "step",
            "",
            (Line(*bins.curve(values), title, group=history.name),),
            log_y=_is_log(name, values),
            caption=_reduction(bins, EXTREMES_DRAWN),
        )
    is_log = _is_log(name, values)
    cells = bins.most_unusual(values, log=is_log)
    known = cells[np.isfinite(cells) & ((cells > 0) | (not is_log))]
    return Heatmap(
        name,
        title,
        bins.centres,
        np.arange(values.shape[1]),
        cells.T,
        "step",
        measure.rows,
        "",
        limits=(float(known.min()), float(known.max())) if known.size and known.max() > known.min() else None,
        log_z=is_log,
        y_text=row_names(measure),
        caption=_reduction(bins, "a column is the most unusual of {} steps"),
        run=history.name,
    )


def _steps_in(steps: np.ndarray, span: tuple[float, float] | None) -> slice:
    """Which steps are shown."""
    if span is None:
        return slice(0, len(steps))
    # One step more on both sides, so that a curve goes on to the edge.
    first, last = np.searchsorted(steps, span, side="left")
    return slice(max(int(first) - 1, 0), int(last) + 1)


def histories_figure(
    histories: Mapping[str, TrainingHistory],
    name: str,
    choice: Mapping[str, str],
    *,
    colours: Mapping[str, int],
    group_of: Mapping[str, str],
    span: tuple[float, float] | None = None,
) -> Lines:
    """A measure of several trainings over their steps: a curve for each run, or the band of the runs of a group.

    ``histories``: run → history; those without the measure are left out, and at least one has it.
    ``group_of``: run → its group, whose runs are put together at the steps that all of them have; empty for single runs.
    Of a measure with rows their mean is drawn.
    """
    having = {run: history for run, history in histories.items() if name in history.measures}
    shared: dict[str, np.ndarray] = {}
    for run, history in having.items():
        group = group_of.get(run, run)
        shared[group] = np.intersect1d(shared.get(group, history.steps), history.steps)
    lines = []
    for run, history in having.items():
        at = np.isin(history.steps, shared[group_of.get(run, run)])
        steps, values = history.steps[at], _over_rows(history.values(name, choice)[at])
        shown = _steps_in(steps, span)
        lines.append(Line(steps[shown].astype(float), values[shown], run, group=run))
    measure = next(iter(having.values())).measures[name]
    title = _title_in_full(measure, choice, *([f"mean over {measure.rows}s"] if measure.rows else []))
    is_log = _is_log(name, np.concatenate([line.y for line in lines]))
    if is_log:  # plotly would draw a line straight down to a zero
        lines = [replace(line, y=np.where(line.y > 0, line.y, np.nan)) for line in lines]
    figure = folded(Lines(name, title, "step", "", tuple(lines), log_y=is_log, runs=colours), group_of)
    bins = [Bins.of(line.x, MOST_COLUMNS) for line in figure.lines]
    return replace(
        figure,
        lines=tuple(_binned(line, each) for line, each in zip(figure.lines, bins, strict=True)),
        caption=_reduction(max(bins, key=lambda each: each.largest), EXTREMES_DRAWN),
    )


def _over_rows(values: np.ndarray) -> np.ndarray:
    """One number a step: (step,) as it is, of (step, row) the mean over rows; NaN where no row has a number."""
    if values.ndim == 1:
        return values
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1))


def _binned(line: Line, bins: Bins) -> Line:
    """A line of few enough points: of a band its ends are kept, of a single curve its peaks."""
    if line.lower is None or line.upper is None or bins.largest < 2:
        x, y = bins.curve(line.y)
        return line if len(x) == len(line.x) else replace(line, x=x, y=y)
    least, greatest = bins.least_and_greatest(line.y)
    low, high = bins.least_and_greatest(line.lower)[0], bins.least_and_greatest(line.upper)[1]
    return replace(line, x=bins.centres, y=(least + greatest) / 2, lower=low, upper=high, error=None)


EXTREMES_DRAWN = "the smallest and the largest number of every {} steps are drawn"


def _reduction(bins: Bins, words: str) -> str:
    return words.format(bins.largest) if bins.largest > 1 else ""


def _is_log(name: str, values: np.ndarray) -> bool:
    known = CATALOGUE.get(name)
    positive = values[values > 0]
    if name == "learning_rate":  # a constant too, so that runs are on one scale
        return positive.size > 0
    if not (name == DRIFT or (known is not None and known.scale == "log")):
        return False
    return positive.size > 0 and float(positive.max()) > 3 * float(positive.min())


def profile_figure(
    name: str,
    choice: Mapping[str, str],
    curves: Mapping[str, tuple[TrainingHistory, int]],
    colours: Mapping[str, int] | None = None,
) -> Lines:
    """A measure along depth at some steps, of one run or of several, with its null.

    ``name``: a measure of all of them that has rows.
    ``curves``: what each curve is called → its history, and the position of its step.
    ``colours``: curve → number of its colour, where they are runs.
    """
    lines = []
    for label, (history, position) in curves.items():
        y = np.asarray(history.values(name, choice)[position], dtype=float)
        names = row_names(history.measures[name])
        lines.append(Line(np.arange(len(y), dtype=float), y, label, group=label, text=names))
    *_, (history, _) = curves.values()
    measure = history.measures[name]
    null = _null_of(history, measure, choice)
    if null is not None:
        # A constant is no noise: of a gain it is what leaves the signal as it is.
        label = NOISE_BASELINE if callable(CATALOGUE[name].null) else "baseline"
        lines.append(replace(lines[-1], y=np.full_like(lines[-1].y, null), label=label, role="null"))
    title = measure_title(measure)
    return Lines(
        f"{name}_at_step",
        title,
        measure.rows,
        "",
        tuple(lines),
        log_y=_is_log(name, np.concatenate([line.y for line in lines if line.role == "measured"])),
        alt=f"{title} by {measure.rows}: {', '.join(curves)}.",
        runs=colours or {},
    )


def _null_of(history: TrainingHistory, measure: Measure, choice: Mapping[str, str]) -> float | None:
    analysis = history.analysis_at(-1)
    if f"{measure.name}_null" not in analysis:
        constant = CATALOGUE[measure.name].null if measure.name in CATALOGUE else None
        return float(constant) if isinstance(constant, (int, float)) else None
    null = analysis[f"{measure.name}_null"]
    labels = measure.labels(choice)
    chosen = null.sel({dim: labels[str(dim)] for dim in null.dims if str(dim) in labels})
    return float(chosen) if not chosen.dims else None
