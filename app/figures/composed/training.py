"""What happened during the training? The loss with the verdicts as they came, depth profiles and matrices step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.figures.build.curve_figure import axis_title
from depthscope.app.figures.build.values import LABELLED, defined_labels
from depthscope.app.figures.composed.panels import MOST_MAPS, Subjects, first_of
from depthscope.app.figures.composed.specification import LetteredPanel, grouped
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.figures.specification import Heatmap, Line, Lines, Selection
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE, judge

NO_HISTORY = "no run has metrics of several training steps: record one with ds.record(metrics='live')"
MOST_JUDGED = 20
"""Steps that are judged: each takes some hundredths of a second. A heuristic of ours."""


@dataclass(frozen=True)
class Loss:
    """The loss by step, with a mark where a verdict first warned or failed."""

    key: str = "loss"
    title: str = "training loss"

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """The panel, or the reason why there is none."""
        del view  # the loss has one version
        lines: list[Line] = []
        words: list[str] = []
        for run, history in subjects.histories.items():
            if "loss" not in history or not bool(history["loss"].notnull().any()):
                continue
            steps = history["step"].values.astype(np.float64)
            loss = history["loss"].values.astype(np.float64)
            lines.append(Line(steps, loss, run, group=run))
            marks = first_steps(history)
            at = {step: float(loss[np.argmin(np.abs(steps - step))]) for step in marks}
            lines += [
                Line(np.array([float(step)]), np.array([at[step]]), "a verdict", role="mark", group=run)
                for step in marks
            ]
            words += [f"{run}, step {step}: {', '.join(names)}" for step, names in marks.items()]
        if not lines:
            return NO_HISTORY if not subjects.histories else "no run has recorded its loss"
        caption = f"Marks: a verdict first warns or fails ({'; '.join(words)})." if words else ""
        ends = (
            f"{line.label} {number(line.y[0])} to {number(line.y[-1])}" for line in lines if len(line.x) > 1
        )
        figure = Lines(
            name=self.key,
            title="Training loss",
            x_label="training step",
            y_label="loss",
            lines=tuple(lines),
            caption=caption,
            alt=f"Training loss: {'; '.join(ends)}. {caption}",
            runs=colour_numbers(subjects.analyses),
        )
        return [
            LetteredPanel(
                self.key, self.title, grouped(figure, subjects.groups) if subjects.groups else figure
            )
        ]


def first_steps(history: xr.Dataset) -> dict[int, list[str]]:
    """The steps at which a verdict warns or fails for the first time.

    Returns: Step → names of verdicts; of a long history so many steps are judged as `MOST_JUDGED`.
    """
    steps = history["step"].values
    chosen = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(len(steps), MOST_JUDGED))})
    known: set[str] = set()
    found: dict[int, list[str]] = {}
    for place in chosen:
        row = history.isel(step=[place])
        # What was not measured at a step is NaN there, where it is among metrics of all steps.
        unknown = [name for name, values in row.data_vars.items() if not bool(values.notnull().any())]
        findings = judge(row.drop_vars(unknown))
        new = {finding.verdict for finding in findings if finding.severity.name in ("WARN", "FAIL")} - known
        if new:
            found[int(steps[place])] = sorted(name.replace("_", " ") for name in new)
            known |= new
    return found


MOST_CELLS = 36
"""Panels of one page. A heuristic of ours: those of four streams are 24."""


@dataclass(frozen=True)
class History:
    """One metric over steps and depth, a heat map of each of the first runs that have it.

    ``metric, title``: name in the catalogue, and what is printed.
    ``fixed``: labels that override the selection.
    """

    metric: str
    title: str
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """The panels, or the reason why there is none."""
        if not subjects.histories:
            return NO_HISTORY
        chosen = replace(view, **self.fixed)
        by_run = {run: _by_step(history, self.metric, chosen) for run, history in subjects.histories.items()}
        able = {run: values for run, values in by_run.items() if values is not None}
        part = first_of("Maps", MOST_MAPS, len(able))
        panels: list[LetteredPanel] = []
        for run, values in list(able.items())[:MOST_MAPS]:
            # The statistics have no mean over streams: one of them is shown, by name.
            stream = str(values.attrs.get("stream", "mean"))
            of_stream = "" if stream == "mean" else f", stream {stream}"
            title = f"{self.title}{of_stream}" + ("" if len(subjects.readings) == 1 else f": {run}")
            key = self.metric if not panels else f"{self.metric}_{len(panels) + 1}"
            panels.append(LetteredPanel(key, title, _step_map(self.metric, self.title, run, values, part)))
        return panels or f"no run has {self.metric} at several steps"


def _by_step(history: xr.Dataset, metric: str, view: Selection) -> xr.DataArray | None:
    """The metric as (step, axis), at the steps that have a value; None where fewer than two do."""
    if metric not in history or "step" not in history[metric].dims:
        return None
    values, stream = history[metric], "mean"
    for dim in set(LABELLED) & set(map(str, values.dims)):
        label = getattr(view, dim)
        label = "forward" if label == "both" else label
        if dim == "stream":
            defined = defined_labels(values, dim)
            stream = label = label if label in defined else next(iter(defined), label)
        if label not in values[dim].values:
            return None
        values = values.sel({dim: label})
    axis = CATALOGUE[metric].axis
    if set(values.dims) != {"step", axis}:
        return None
    values = values.transpose("step", axis)
    values = values.isel(step=np.flatnonzero(values.notnull().any(axis).values))
    return values.assign_attrs(stream=stream) if values.sizes["step"] > 1 else None


def _step_map(metric: str, title: str, run: str, values: xr.DataArray, caption: str) -> Heatmap:
    axis = CATALOGUE[metric].axis
    z = values.values.astype(np.float64)
    known = z[np.isfinite(z)]
    ends = f"from {number(float(known.min()))} to {number(float(known.max()))}" if known.size else "undefined"
    return Heatmap(
        name=metric,
        title=title,
        x=values["step"].values.astype(np.float64),
        y=np.asarray(
            values[axis].values if axis in values.coords else np.arange(z.shape[1]), dtype=np.float64
        ),
        z=z.T,
        x_label="training step",
        y_label=axis_title(axis, "depth").partition(" (")[0],
        z_label="",
        log_z=CATALOGUE[metric].scale == "log" and bool((known > 0).any()),
        caption=caption,
        alt=f"{title} of {run} over training steps and {axis}: {ends}.",
        metric=metric,
        run=run,
    )
