"""What did a training measure, step by step, and when did each finding begin? Whatever the numbers are read from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.readings.run_arrays import group_of
from depthscope.diagnostics import Finding, Severity, judge, schema, training_curves
from depthscope.diagnostics.analysis.training_curves import curves_of_sums, sums_of
from depthscope.diagnostics.errors import AbsentError
from depthscope.diagnostics.quantities.registry import ROW_FACTS
from depthscope.diagnostics.schema import LiveRows, Status
from depthscope.diagnostics.schema.groups import group_path

ROWS = ("depth", "connection", "weight", "parameter")
"""Dims that are the rows of a map over steps, the first one that a measure has; of the others a label is chosen."""

NOT_SHOWN = ("same_sampled_tokens", "num_tokens", "loss_not_finite", *ROW_FACTS)
"""Flags, what is the same at every step, and what only verdicts read."""

PREFERRED = {
    "centering": "raw",
    "tokens": "all",
    "stream": "mean",
    "direction": "forward",
    "reduction": "mean",
}
"""Labels that are shown where nothing else is chosen; of other dims the first one that has numbers."""


@dataclass(frozen=True, eq=False)
class Measure:
    """What has numbers by step."""

    name: str  # in the catalogue, or `DRIFT`, or of a number such as ``loss``
    rows: str  # its dim of `ROWS`; empty for one number a step
    choices: Mapping[str, tuple[str, ...]]  # the labels of its other dims under which it has numbers
    sample: xr.DataArray  # the last step, with all coordinates

    def labels(self, choice: Mapping[str, str]) -> dict[str, str]:
        """The label of every dim but the rows: the one that is asked for, else the preferred one."""
        found = {}
        for dim, labels in self.choices.items():
            wanted = (choice.get(dim), PREFERRED.get(dim), labels[0])
            found[dim] = next(label for label in wanted if label in labels)
        return found


Key = tuple[str, str | None]


@dataclass(frozen=True)
class Begun:
    """A finding and the first step that had it."""

    finding: Finding  # as it was at the step at which it was most severe
    step: int  # of the training
    lasts: bool  # whether the last step has it too


class TrainingHistory:
    """The numbers of one chain of a run, by step, whether its store grows or it is finished.

    ``reading``: for its name, its attributes and what has no step.
    ``metrics``: what has numbers by step; of a live store read when it is used.
    ``sums``: statistics by step, which give a live store further curves.
    ``rows``: of a live store; `refresh` reads what was added.
    """

    def __init__(
        self, reading: Reading, metrics: xr.Dataset, sums: xr.Dataset, rows: LiveRows | None = None
    ) -> None:
        self.name = reading.name
        self._reading, self._rows = reading, rows
        self._metrics, self._sums = metrics, sums

    def refresh(self) -> bool:
        """Read new rows."""
        if self._rows is None or not self._rows.refresh():
            return False
        self.__dict__.pop("_found", None)
        self._metrics, self._sums = _of_rows(self._reading, self._rows, _without_steps(self._sums))
        return True

    @property
    def steps(self) -> np.ndarray:
        """Every measured step, increasing."""
        if self._rows is not None:
            return self._rows.steps
        return (
            np.asarray(self._metrics["step"].values)
            if "step" in self._metrics.dims
            else np.zeros(0, dtype=int)
        )

    @property
    def times(self) -> np.ndarray | None:
        """When each was measured, in seconds since 1970, where that is known."""
        return None if self._rows is None else self._rows.times

    @property
    def status(self) -> Status | None:
        """Of a live store."""
        return None if self._rows is None else self._rows.status()

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps at which a later attempt went on."""
        if self._rows is not None:
            return tuple(self._rows.resumed)
        found = self._reading.attrs.get(schema.RESUMED_AT, ())
        return tuple(int(step) for step in np.atleast_1d(np.asarray(found, dtype=float)) if np.isfinite(step))

    @property
    def num_bytes(self) -> int:
        """Of its numbers, some of which the analysis has too."""
        return sum(array.nbytes for array in self._metrics.data_vars.values())

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Everything that has numbers by step, except of pairs of depths."""
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[str, Measure], dict[str, tuple[str, ...]]]:
        """Measures, and the sums of those that are computed from them."""
        samples = {
            str(name): array.isel(step=-1)
            for name, array in self._metrics.items()
            if _is_shown(str(name), array)
        }
        needs: dict[str, tuple[str, ...]] = {}
        last = self._sums.isel(step=[-1]) if self._sums.sizes.get("step") else self._sums
        if self._rows is not None:
            for name, array in curves_of_sums(last).items():
                if name not in samples:
                    samples[str(name)], needs[str(name)] = array.isel(step=0), sums_of(str(name))
        if self._rows is None:  # what an analysis of the last step alone has is no history
            by_step = self._metrics[list(samples)]
            samples = {name: each for name, each in samples.items() if by_step[name][:-1].notnull().any()}
        return measures_of(samples), needs

    def values(self, name: str, choice: Mapping[str, str]) -> np.ndarray:
        """The numbers of a measure: (step, row), or (step,) for one number a step."""
        measure = self.measures[name]
        labels = measure.labels(choice)
        if name in self._found[1]:
            needed = {*self._found[1][name], *_without_steps(self._sums).variables}
            found = curves_of_sums(self._sums.drop_vars(set(self._sums.data_vars) - needed))[name].values
        else:
            found = self._metrics[name].values
        index = [
            slice(None) if dim == measure.rows else _labels(measure.sample, dim).index(labels[str(dim)])
            for dim in measure.sample.dims
        ]
        return np.asarray(found[(slice(None), *index)], dtype=np.float32)

    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step, as an analysis of it, which verdicts can judge."""
        found = self._metrics
        if all("step" not in array.dims for array in found.data_vars.values()):
            found = curves_of_sums(self._sums.isel(step=[position]))
            position = 0
        return found.isel(step=[position]).assign_attrs(self._reading.analysis.attrs)

    def begun(self) -> list[Begun]:
        """Warnings and failures by the step at which they began, as they were stored with its row."""
        stored = self._reading.attrs.get(schema.FINDINGS, ()) if self._rows is None else self._rows.findings
        by_step: dict[Key, Begun] = {}
        if not stored:
            return []
        # What a store has added since it was read is judged here: one step, some hundredths of a second.
        now = self._reading.findings if self._rows is None else judge(self.analysis_at(-1))
        last = {_key(finding) for finding in now if finding.severity >= Severity.WARN}
        for entry in sorted(stored, key=lambda entry: int(entry["step"])):
            finding = Finding.from_dict(entry)
            if finding.severity >= Severity.WARN and finding.chain in ("", self._reading.chain):
                key = _key(finding)
                since = by_step[key].step if key in by_step else int(entry["step"])
                by_step[key] = Begun(finding, since, key in last)
        return sorted(by_step.values(), key=lambda each: (each.step, -each.finding.severity))


def _key(finding: Finding) -> Key:
    return finding.verdict, finding.stream


def history_of(reading: Reading, runs: Mapping[str, xr.DataTree] = MappingProxyType({})) -> TrainingHistory:
    """The history of a reading, from its file, which was checked before; of a live store one that can be refreshed."""
    path = Path(reading.path)
    if schema.is_live_store(path):
        rows, sums = LiveRows(path), xr.Dataset()
        with suppress(AbsentError), schema.open_group(path, "statistics", reading.chain) as state:
            sums = _without_steps(state)
            # Sums over features, which no history needs, are the largest part of it.
            known = [name for name, array in sums.data_vars.items() if array.dims in (("weight",), ("cell",))]
            sums = sums[known].assign_coords(sums.coords).load()
        return TrainingHistory(reading, *_of_rows(reading, rows, sums), rows)
    analysis, sums = reading.analysis, xr.Dataset()
    if reading.num_steps > 1:  # the statistics of one step are no history
        with group_of(reading, "statistics", runs) as statistics:
            sums = sums if statistics is None else statistics.load()
    curves = training_curves(xr.DataTree.from_dict({"statistics": sums})).load() if sums else sums
    curves = curves[[name for name in curves.data_vars if curves[name].dims[:1] == ("step",)]]
    if analysis.sizes.get("step", 1) < curves.sizes.get("step", 1):
        analysis = curves  # sums of every step, and an analysis of the last one
    elif "step" in curves and curves["step"].equals(analysis["step"]):
        analysis = analysis.assign({name: curves[name] for name in curves if name not in analysis})
    return TrainingHistory(reading, analysis, sums)


def _of_rows(reading: Reading, rows: LiveRows, known: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """What the rows of a store have of a chain, read when it is used: its metrics, and its sums with what has no step."""
    metrics, sums = (
        rows.dataset(group_path(group, reading.chain), of)
        for group, of in (("metrics", xr.Dataset()), ("statistics", known))
    )
    return metrics.reset_coords([name for name in metrics.coords if str(name).endswith("_null")]), sums


def _without_steps(sums: xr.Dataset) -> xr.Dataset:
    return sums.drop_dims("step", errors="ignore")


def _is_shown(name: str, array: xr.DataArray) -> bool:
    """Whether it is drawn over steps: an error is no measure of its own, and a spectrum of every depth has no room."""
    is_measure = not name.endswith(("_stderr", "_null", "_error")) and not {"order", "quantile"} & set(
        array.dims
    )
    return is_measure and array.dims[:1] == ("step",)


def measures_of(samples: Mapping[str, xr.DataArray]) -> dict[str, Measure]:
    """Those of some numbers of the last step that can be drawn over steps."""
    found = {}
    for name, sample in samples.items():
        rows = next((dim for dim in ROWS if dim in sample.dims), "")
        if name in NOT_SHOWN or any(str(dim).startswith("other_") for dim in sample.dims):
            continue
        defined = np.isfinite(sample.values.astype(float))
        # The first steps of some measures have no number, such as of an update: then every label is offered.
        defined = defined if defined.any() else np.ones_like(defined)
        choices = {}
        for dim in sample.dims:
            if dim != rows:
                others = tuple(i for i, other in enumerate(sample.dims) if other != dim)
                known = zip(_labels(sample, dim), defined.any(axis=others), strict=True)
                choices[str(dim)] = tuple(label for label, is_known in known if is_known)
        found[name] = Measure(name, rows, choices, sample)
    return found


def _labels(array: xr.DataArray, dim: Hashable) -> list[str]:
    return [str(label) for label in (array[dim].values if dim in array.coords else range(array.sizes[dim]))]
