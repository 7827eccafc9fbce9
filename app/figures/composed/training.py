"""What happened during the training? The loss with the verdicts as they came, and depth profiles step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from depthscope.app.figures.build.curve_figure import axis_title
from depthscope.app.figures.build.history_figure import history_figure
from depthscope.app.figures.build.spread import folded
from depthscope.app.figures.composed.panels import MOST_MAPS, Subjects, first_of
from depthscope.app.figures.composed.specification import LetteredPanel
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.figures.specification import Heatmap, Line, Lines, Selection
from depthscope.app.readings.first_findings import FirstFindings
from depthscope.app.readings.training_history import TrainingHistory
from depthscope.app.text.numbers import number

NO_HISTORY = "no run has metrics of several training steps: record one with ds.record(metrics='live')"


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
            if "loss" not in history.measures:
                continue
            steps, loss = history.steps.astype(np.float64), history.values("loss", {}).astype(np.float64)
            lines.append(Line(steps, loss, run, group=run))
            for step, names in first_steps(history).items():
                at = loss[[np.argmin(np.abs(steps - step))]]
                lines.append(Line(np.array([float(step)]), at, "a verdict", role="mark", group=run))
                words.append(f"{run}, step {step}: {', '.join(names)}")
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
        return [LetteredPanel(self.key, self.title, folded(figure, subjects.groups))]


def first_steps(history: TrainingHistory) -> dict[int, list[str]]:
    """The steps at which a verdict warns or fails for the first time: step → names of verdicts."""
    findings = FirstFindings(history)
    findings.look(float("inf"))
    known: set[str] = set()
    found: dict[int, list[str]] = {}
    for begun in findings.begun():
        name = begun.finding.verdict
        if name not in known:
            found.setdefault(begun.step, []).append(name.replace("_", " "))
            known.add(name)
    return found


@dataclass(frozen=True)
class History:
    """One metric over steps and depth, a heat map of each of the first runs that have it."""

    metric: str
    title: str

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """The panels, or the reason why there is none."""
        if not subjects.histories:
            return NO_HISTORY
        able = {run: each for run, each in subjects.histories.items() if self.metric in each.measures}
        part = first_of("Maps", MOST_MAPS, len(able))
        panels: list[LetteredPanel] = []
        for run, history in list(able.items())[:MOST_MAPS]:
            figure = history_figure(history, self.metric, asdict(view))
            if not isinstance(figure, Heatmap):
                continue
            # The statistics have no mean over streams: one of them is shown, by name.
            stream = history.measures[self.metric].labels(asdict(view)).get("stream", "mean")
            of_stream = "" if stream == "mean" else f", stream {stream}"
            title = f"{self.title}{of_stream}" + ("" if len(subjects.readings) == 1 else f": {run}")
            key = self.metric if not panels else f"{self.metric}_{len(panels) + 1}"
            known = figure.z[np.isfinite(figure.z)]
            ends = (
                f"from {number(float(known.min()))} to {number(float(known.max()))}"
                if known.size
                else "undefined"
            )
            shown = replace(
                figure,
                title=self.title,
                x_label="training step",
                y_label=axis_title(figure.y_label, "depth").partition(" (")[0],
                caption=" ".join(filter(None, (figure.caption, part))),
                alt=f"{self.title} of {run} over training steps and {figure.y_label}: {ends}.",
                metric=self.metric,
            )
            panels.append(LetteredPanel(key, title, shown))
        return panels or f"no run has {self.metric} at several steps"
