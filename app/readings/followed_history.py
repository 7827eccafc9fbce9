"""How is the history of a live store read? From its rows, of which only new ones are read when it is looked at again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.readings.run_arrays import group_of
from depthscope.app.readings.saved_history import SavedHistory, cells_of
from depthscope.app.readings.training_history import (
    CELLS,
    Measure,
    TrainingHistory,
    count_of,
    measures_of,
    positions_of,
    slices_of,
)
from depthscope.diagnostics import schema
from depthscope.diagnostics.analysis.training_curves import curves_of_sums, sums_of
from depthscope.diagnostics.errors import AbsentError
from depthscope.diagnostics.metrics.definitions import is_still_defined_so
from depthscope.diagnostics.schema import LiveRows, Status


class FollowedHistory(TrainingHistory):
    """The history of a live store with metrics by step, growing or not: `refresh` reads what is new.

    ``reading``: one chain, for its names and what its rows do not have.
    ``store``: its rows.
    ``metrics, sums``: what has no step in the /metrics and /statistics of the chain: nulls, and the labels of the
    rows.
    """

    def __init__(self, reading: Reading, store: LiveRows, metrics: xr.Dataset, sums: xr.Dataset) -> None:
        super().__init__(reading.name)
        self._reading, self._store, self._known, self._sums = reading, store, metrics, sums
        self._metrics, self._statistics = (
            _prefix(group, reading.chain) for group in ("metrics", "statistics")
        )

    def refresh(self) -> bool:
        """Read new rows."""
        is_new = self._store.refresh()
        if is_new:
            self.__dict__.pop("_found", None)
        return is_new

    @property
    def steps(self) -> np.ndarray:
        """Every measured step."""
        return self._store.steps

    @property
    def times(self) -> np.ndarray | None:
        """When each was measured."""
        return self._store.times

    @property
    def status(self) -> Status | None:
        """What the store is now."""
        return self._store.status()

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps at which a later attempt went on."""
        return tuple(one["step"] for one in self._store.status().resumed)

    @property
    def evaluations_left_out(self) -> int:
        """Forwards without training between the steps."""
        return count_of({**self._reading.attrs, **self._store.attrs.get("", {})})

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Everything that has numbers by step."""
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[str, Measure], dict[str, tuple[str, ...]]]:
        """Measures, and the sums of those that are not stored themselves."""
        rows = self._metrics_at(len(self.steps) - 1)
        samples = {
            str(name): array.isel(step=0) for name, array in rows.data_vars.items() if "step" in array.dims
        }
        last = self._sums_at(len(self.steps) - 1)
        needs: dict[str, tuple[str, ...]] = {}
        for name, array in curves_of_sums(last).items():
            if name not in samples:
                samples[str(name)], needs[str(name)] = array.isel(step=0), sums_of(str(name))
        cells = cells_of(last)
        if cells is not None:
            samples[CELLS] = cells.isel(step=0)
        return measures_of(samples), needs

    def values(self, name: str, choice: Mapping[str, str]) -> np.ndarray:
        """The numbers of a measure; see `TrainingHistory.values`."""
        measure = self.measures[name]
        chosen = positions_of(measure, choice)
        if name == CELLS:
            return self._cells(chosen[0])
        sums = self._found[1].get(name)
        if sums is None:
            column = self._store.column(f"{self._metrics}{name}")
            return column[(slice(None), *slices_of(chosen))].astype(np.float32)
        found = curves_of_sums(self._all_sums(sums))[name].values
        return np.asarray(found[(slice(None), *slices_of(chosen))], dtype=np.float32)

    def _all_sums(self, names: Iterable[str]) -> xr.Dataset:
        columns = {
            name: (("step", *self._store.variables[full].dims), self._store.column(full))
            for name in names
            if (full := f"{self._statistics}{name}") in self._store.variables
        }
        # What has no step, such as the sizes of weights, and the labels.
        return self._sums.assign_coords(step=self.steps).assign(columns)

    def _cells(self, connection: int | None) -> np.ndarray:
        tokens = self._store.column(f"{self._statistics}token_count")
        at = slice(None) if connection is None else connection
        parts = []
        for of in schema.SUMMED:
            full = f"{self._statistics}{of.total}"
            if full not in self._store.variables:
                continue
            sums = self._store.column(full)[:, at].reshape(len(tokens), -1)
            known = f"{self._statistics}{of.counted_by}"
            of_some = of.counted_by != "token_count" and known in self._store.variables
            counts = self._store.column(known)[:, at] if of_some else tokens
            with np.errstate(divide="ignore", invalid="ignore"):
                parts.append(np.where(counts[:, None] > 0, sums / counts[:, None], np.nan))
        return np.concatenate(parts, axis=1)

    def _sums_at(self, position: int) -> xr.Dataset:
        return self._sums.assign_coords(step=self.steps[[position]]).assign(
            self._row(position, self._statistics)
        )

    def _metrics_at(self, position: int) -> xr.Dataset:
        rows = xr.Dataset(self._row(position, self._metrics), {"step": self.steps[[position]]})
        # Where later rows have more labels than the store had when it was opened, they are numbered.
        other = [dim for dim, size in rows.sizes.items() if self._known.sizes.get(str(dim), size) != size]
        known = self._known.drop_dims(other)
        return rows.assign_coords(known.coords).assign(known.data_vars)

    def _row(self, position: int, prefix: str) -> dict[str, xr.Variable]:
        """The numbers of one group in one row, by their names in the group."""
        return {
            full.removeprefix(prefix): xr.Variable(
                ("step", *dims), values[None], dict(self._store.variables[full].attrs)
            )
            for full, (dims, values) in self._store.row(position).items()
            if full.startswith(prefix)
            and "/" not in (name := full.removeprefix(prefix))
            and is_still_defined_so(name, self._store.variables[full].attrs)
        }

    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step."""
        found = self._metrics_at(position)
        if all("step" not in array.dims for array in found.data_vars.values()):
            found = curves_of_sums(self._sums_at(position))
        return found.assign_attrs(self._reading.analysis.attrs)


def history_of(reading: Reading) -> TrainingHistory:
    """The history of a reading, from its file, which was verified when it was read.

    Returns: One that can be refreshed, of a live store.
    """
    path = Path(reading.path)
    if schema.is_live_store(path):
        return _followed(reading, LiveRows(path))
    if reading.num_steps < 2:  # the statistics of one step are no history
        return SavedHistory(reading, xr.Dataset(), None)
    with group_of(reading, "statistics") as statistics:
        assert statistics is not None
        return SavedHistory.of(reading, statistics)


def _followed(reading: Reading, store: LiveRows) -> FollowedHistory:
    # All of the metrics is in the rows, which are read in any case: what has no step is with their labels.
    metrics = xr.Dataset(coords=_labels(store, "metrics", reading.chain))
    nulls = [name for name in metrics.coords if str(name).endswith("_null")]
    sums = xr.Dataset()
    with suppress(AbsentError), schema.open_group(store.path, "statistics", reading.chain) as state:
        sums = state.drop_dims("step", errors="ignore")
        # Sums over features, which no history needs, are the largest part of it.
        kept = [name for name, array in sums.data_vars.items() if array.dims in (("weight",), ("cell",))]
        sums = sums[kept].assign_coords(sums.coords).load()
    labels = _labels(store, "statistics", reading.chain)
    sums = sums.assign_coords({name: label for name, label in labels.items() if name not in sums.variables})
    return FollowedHistory(reading, store, metrics.reset_coords(nulls), sums)


def _labels(store: LiveRows, group: str, chain: str) -> dict[str, xr.Variable]:
    """What has no step in the rows of a group."""
    prefix = _prefix(group, chain)
    return {
        label: xr.Variable(fields["dims"], fields["values"], dict(fields["attrs"]))
        for name, fields in store.coords.items()
        if name.startswith(prefix) and "/" not in (label := name.removeprefix(prefix))
    }


def _prefix(group: str, chain: str) -> str:
    """What the names of a group's variables begin with in a live store."""
    return f"{group}/{chain}/" if chain else f"{group}/"
