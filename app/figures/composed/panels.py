"""Which panels can some runs feed? Recipes: curves of all runs, maps of a few of them, their matrices, their training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import xarray as xr

from depthscope.app.figures.build.curve_figure import axis_title
from depthscope.app.figures.build.history_figure import history_figure
from depthscope.app.figures.build.values import fed, folded, folded_colours
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.figures.specification import Figure, FigureKind, Heatmap, Line, Lines, Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.run_arrays import MixingMatrices, matrices_of
from depthscope.app.readings.training_history import TrainingHistory, history_of
from depthscope.app.text.numbers import number
from depthscope.diagnostics.errors import InputError

MOST_MAPS = 3
"""Runs whose maps are in a composed figure, the first ones; those of all are in the supplement. More do not fit across a
page: a heuristic of ours."""

NO_MATRICES = (
    "no run has streams whose mixing matrices are stored; of a run in memory give the run itself, "
    "since its analysis has none"
)

MOST_MATRICES = 2
"""Runs whose matrices are in a composed figure: each takes six panels."""


@dataclass(frozen=True, eq=False)
class Subjects:
    """The runs of a composed figure with what it needs of them.

    ``readings``: runs, in the order of their colours.
    ``runs``: runs in memory, by the names that `read_runs` was given.
    ``groups``: run → group, where runs are repetitions of some designs; empty where each is one of its own.
    """

    readings: tuple[Reading, ...]
    runs: Mapping[str, xr.DataTree] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, int]:
        """What has a colour of its own, groups or runs, with the number of that colour."""
        return folded_colours(colour_numbers(self.analyses), self.groups)

    @cached_property
    def analyses(self) -> dict[str, xr.Dataset]:
        """Analysis by run."""
        return {reading.name: reading.analysis for reading in self.readings}

    @cached_property
    def matrices(self) -> dict[str, MixingMatrices]:
        """Mixing matrices of the runs that have some."""
        found = {reading.name: matrices_of(reading, self.runs) for reading in self.readings}
        return {run: matrices for run, matrices in found.items() if matrices is not None}

    @cached_property
    def histories(self) -> dict[str, TrainingHistory]:
        """What was measured by step, of the runs that have several steps."""
        found = {reading.name: history_of(reading, self.runs) for reading in self.readings}
        return {run: history for run, history in found.items() if len(history.steps) > 1}

    def why_not(self, metric: str) -> str:
        """Why no run has a metric."""
        reasons = dict.fromkeys(
            str(data.attrs.get("not_computed", {}).get(metric, "")) for data in self.analyses.values()
        )
        return (
            "; ".join(filter(None, reasons)) or f"no run has a defined value of {metric} under this selection"
        )


class PanelRecipe(Protocol):
    """How one or several panels are made."""

    @property
    def title(self) -> str:
        """What is printed after the letter, and named where there is no such panel."""

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """The panels, or the reason why there is none."""


@dataclass(frozen=True)
class Curves:
    """One panel with a curve of every run.

    ``key, title``: of the panel.
    ``kind``: a figure of the catalogue.
    ``fixed``: labels that override the selection.
    ``log_y``: a logarithmic axis also where the metric's own is linear: a null that is far off must not flatten the
    curves.
    """

    key: str
    title: str
    kind: FigureKind
    fixed: Mapping[str, Any] = field(default_factory=dict)
    log_y: bool = False

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """The panel, or the reason why there is none."""
        analyses = subjects.analyses
        figure = self.kind.build(analyses, **asdict(replace(view, **self.fixed)))
        assert isinstance(figure, Lines)
        measured = figure.of("measured")
        if not any(np.isfinite(line.y).any() for line in measured):
            return subjects.why_not(self.kind.metric)
        # The title names what is fixed, such as the direction: the plain line of a run is that one.
        lines = tuple(
            replace(line, label=line.group)
            if line.label in {f"{line.group} · {label}" for label in self.fixed.values()}
            else line
            for line in figure.lines
        )
        figure = replace(figure, lines=lines, log_y=figure.log_y or self.log_y)
        return [LetteredPanel(self.key, self.title, folded(figure, subjects.groups))]


@dataclass(frozen=True)
class Maps:
    """A heat map of each of the first runs that have one.

    ``key, title``: of the panels; the run's name is added where several are shown.
    ``kind``: a figure of the catalogue.
    ``fixed``: labels that override the selection.
    ``most``: runs.
    ``floor``: values below this share of the largest one of their column are rounding and undefined.
    """

    key: str
    title: str
    kind: FigureKind
    fixed: Mapping[str, Any] = field(default_factory=dict)
    most: int = MOST_MAPS
    floor: float = 0.0

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """The panels, or the reason why there is none."""
        # Matrices are not overlaid, so that they need no shared axis.
        view = replace(view, axis="depth", **self.fixed)
        analyses = subjects.analyses
        able = [run for run, _, _ in fed(analyses, self.kind.metric, view)]
        if not able:
            return subjects.why_not(self.kind.metric)
        panels = []
        for place, run in enumerate(able[: self.most]):
            figure = self.kind.build({run: analyses[run]}, **asdict(replace(view, run=run)))
            assert isinstance(figure, Heatmap)
            title = self.title if len(subjects.readings) == 1 else f"{self.title}: {run}"
            caption = " ".join(filter(None, (figure.caption, first_of("Maps", self.most, len(able)))))
            figure = replace(_without_rounding(figure, self.floor), caption=caption)
            panels.append(LetteredPanel(_numbered(self.key, place), title, figure))
        return panels


def first_of(what: str, most: int, count: int) -> str:
    """A sentence for a caption, where not all runs are shown."""
    return f"{what} of the first {most} of {count} runs." if count > most else ""


def _without_rounding(figure: Heatmap, floor: float) -> Heatmap:
    """A map without what is rounding noise, which would take all of a logarithmic colour scale, and without empty rows."""
    z = figure.z
    if floor:
        with np.errstate(invalid="ignore"):
            z = np.where(z > floor * np.fmax.reduce(z, axis=0, initial=0.0), z, np.nan)
    keep = np.isfinite(z).any(axis=1)
    if not keep.any():
        return figure
    text = [name for name, kept in zip(figure.y_text or [], keep, strict=False) if kept] or None
    return replace(figure, z=z[keep], y=figure.y[keep], y_text=text)


def _numbered(key: str, place: int) -> str:
    """The first run's panel has the plain key, so that code that adapts a figure of one run serves several."""
    return key if place == 0 else f"{key}_{place + 1}"


@dataclass(frozen=True)
class Matrices:
    """H_res of the first, a middle and the last connection, and its products over each half and over all."""

    key: str = "mixing"
    title: str = "mixing matrices"

    def panels(self, subjects: Subjects, view: Selection) -> list[LetteredPanel] | str:
        """Six panels a run, or the reason why there is none."""
        del view  # means over all real tokens, whatever slice other figures show
        if not subjects.matrices:
            return NO_MATRICES
        panels = []
        part = first_of("Matrices", MOST_MATRICES, len(subjects.matrices))
        drawn = dict(list(subjects.matrices.items())[:MOST_MATRICES])
        limits = {
            "h": _shared_limits(matrix for found in drawn.values() for matrix in found.single),
            "p": _shared_limits(matrix for found in drawn.values() for matrix in found.products.values()),
        }
        for place, (run, found) in enumerate(drawn.items()):
            of_run = "" if len(subjects.readings) == 1 else f": {run}"
            last = len(found.single) - 1
            shown = [
                *(
                    (f"h{c}", f"connection {c}{of_run}", found.single[c])
                    for c in sorted({0, last // 2, last})
                ),
                *(
                    (f"p{a}-{b}", f"product {a}–{b}{of_run}", product)
                    for (a, b), product in found.products.items()
                    if b > a
                ),
            ]
            panels += [
                LetteredPanel(_numbered(key, place), title, _printed(key, run, matrix, limits[key[0]], part))
                for key, title, matrix in shown
            ]
        return panels


def _shared_limits(matrices: Iterable[np.ndarray]) -> tuple[float, float] | None:
    """The ends of one colour scale; 0 is among them."""
    values = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    return (min(0.0, float(values.min())), float(values.max())) if values.size else None


def _printed(
    key: str, run: str, matrix: np.ndarray, limits: tuple[float, float] | None, part: str
) -> Heatmap:
    streams = np.arange(len(matrix), dtype=np.float64)
    # A product that has grown would leave single matrices one colour.
    kind = "products" if key.startswith("p") else "single matrices"
    scale = f"Colours of {kind}: {number(limits[0])} to {number(limits[1])}." if limits else ""
    rows, columns = matrix.sum(axis=1), matrix.sum(axis=0)
    return Heatmap(
        name=key,
        title=key,
        x=streams,
        y=streams,
        z=matrix,
        x_label="",
        y_label="",
        z_label="",
        limits=limits,
        caption="Means over tokens, of products the mean of each token's product; rows are destinations. At the right the "
        f"signed sum of each row (gain forward), below that of each column (gain backward). {scale} {part}".rstrip(),
        alt=f"{key} of {run}: row sums {', '.join(f'{v:.2f}' for v in rows)}; "
        f"column sums {', '.join(f'{v:.2f}' for v in columns)}.",
        metric="mixing_gain",
        run=run,
        printed=True,
    )


def in_one_line(reasons: Iterable[str]) -> str:
    """Distinct reasons, once each."""
    return "; ".join(dict.fromkeys(reasons))


@dataclass(frozen=True, eq=False)
class LetteredPanel:
    """One panel of a composed figure.

    ``key``: its name, the same whichever letter it has: the key of ``axes=``, and part of the name of its data.
    ``title``: what is printed after its letter.
    ``content``: what is drawn.
    """

    key: str
    title: str
    content: Figure


@dataclass(frozen=True, eq=False)
class Composed:
    """A figure of panels that answers one question of a paper.

    ``name, title``: key of the register, and the beginning of the caption.
    ``panels``: in the order of their letters.
    ``runs``: all runs that are shown, with the numbers of their colours.
    ``caption, alt``: words below the figure, and for those who do not see it.
    ``left_out``: panels that no run can feed, with the reason.
    """

    name: str
    title: str
    panels: tuple[LetteredPanel, ...]
    runs: Mapping[str, int]
    caption: str = ""
    alt: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are drawn."""
        return tuple(dict.fromkeys(panel.content.metric for panel in self.panels if panel.content.metric))

    @property
    def sources(self) -> tuple[str, ...]:
        """Bibliography keys of laws and nulls that are drawn."""
        return tuple(dict.fromkeys(key for panel in self.panels for key in panel.content.sources))


def groups_of(readings: Sequence[Reading], by: str) -> dict[str, str]:
    """The group of each run, by an attribute such as ``"family"``; empty for no groups."""
    if not by:
        return {}
    for reading in readings:
        if reading.attrs.get(by) is None:
            known = ", ".join(sorted(name for name, value in reading.attrs.items() if np.isscalar(value)))
            raise InputError(f"run {reading.name} has no attribute {by!r} to group by; it has {known}")
    return {reading.name: str(reading.attrs[by]) for reading in readings}


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
    known: set[str] = set()
    found: dict[int, list[str]] = {}
    for begun in history.begun():
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
