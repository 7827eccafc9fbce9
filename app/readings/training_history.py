"""What did a training measure, step by step? Its numbers by step, of a run that is being written or of one that is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import schema, training_curves
from depthscope.diagnostics.analysis.training_curves import STEPWISE_SUMS, curves_of_sums
from depthscope.diagnostics.schema import FollowedStore, Status

__all__ = ["CELLS", "DRIFT", "FollowedHistory", "Measure", "SavedHistory", "TrainingHistory"]

CELLS = "connection_cells"
"""The elements of H_res, H_pre and H_post of a connection, in the mean over tokens."""

DRIFT = "connection_parameter_drift"

ROWS = ("cell", "depth", "connection", "weight", "parameter")
"""Dims that are the rows of a map over steps, the first one that a measure has; of the others a label is chosen."""

NOT_SHOWN = ("same_sampled_tokens", "num_tokens")
"""A flag, and what is the same at every step."""

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
    """What has numbers by step.

    Parameters
    ----------
    name : str
        In the catalogue, or `CELLS` or `DRIFT`, or of a number such as ``loss``.
    rows : str
        Its dim of `ROWS`; empty for one number a step.
    choices : mapping of str to tuple of str
        The labels of its other dims under which it has numbers.
    sample : DataArray
        The last step, with all coordinates.
    """

    name: str
    rows: str
    choices: Mapping[str, tuple[str, ...]]
    sample: xr.DataArray

    def labels(self, choice: Mapping[str, str]) -> dict[str, str]:
        """The label of every dim but the rows.

        Parameters
        ----------
        choice : mapping of str to str
            What is asked for; a label that it does not have gives the preferred one.

        Returns
        -------
        dict of str to str
        """
        found = {}
        for dim, labels in self.choices.items():
            wanted = (choice.get(dim), PREFERRED.get(dim), labels[0])
            found[dim] = next(label for label in wanted if label in labels)
        return found


class TrainingHistory(ABC):
    """The numbers of one chain of a run, by step.

    Parameters
    ----------
    name : str
        Of the reading.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def steps(self) -> np.ndarray:
        """Every measured step, increasing."""

    @property
    def times(self) -> np.ndarray | None:
        """When each was measured, in seconds since 1970, where that is known."""
        return None

    @property
    def status(self) -> Status | None:
        """Of a live store."""
        return None

    @property
    @abstractmethod
    def resumed_at(self) -> tuple[int, ...]:
        """Steps at which a later attempt went on."""

    @property
    def evaluations_left_out(self) -> int:
        """Forwards without training between the steps, which count to none of them."""
        return 0

    @property
    @abstractmethod
    def measures(self) -> Mapping[str, Measure]:
        """Everything that has numbers by step, except of pairs of depths."""

    @abstractmethod
    def values(self, name: str, choice: Mapping[str, str]) -> np.ndarray:
        """The numbers of a measure.

        Parameters
        ----------
        name : str
            A key of `measures`.
        choice : mapping of str to str
            Labels; see `Measure.labels`.

        Returns
        -------
        ndarray
            (step, row), or (step,) for one number a step.
        """

    @abstractmethod
    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step, as an analysis of it, which verdicts can judge.

        Parameters
        ----------
        position : int
            Of the step, from 0 on.

        Returns
        -------
        Dataset
        """


class UntilStep(TrainingHistory):
    """A history without what came after a step.

    Parameters
    ----------
    history : TrainingHistory
        Perhaps one that grows.
    step : int
        The last step that is seen.
    """

    def __init__(self, history: TrainingHistory, step: int) -> None:
        super().__init__(history.name)
        self._history = history
        self._count = max(1, int(np.searchsorted(history.steps, step, side="right")))

    @property
    def steps(self) -> np.ndarray:
        """Every measured step."""
        return self._history.steps[: self._count]

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps at which a later attempt went on."""
        return tuple(step for step in self._history.resumed_at if step <= self.steps[-1])

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Everything that has numbers by step."""
        return self._history.measures

    def values(self, name: str, choice: Mapping[str, str]) -> np.ndarray:
        """The numbers of a measure; see `TrainingHistory.values`."""
        return self._history.values(name, choice)[: self._count]

    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step."""
        return self._history.analysis_at(position % self._count)


def _measures(samples: Mapping[str, xr.DataArray]) -> dict[str, Measure]:
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
                labels = sample[dim].values if dim in sample.coords else np.arange(sample.sizes[dim])
                known = defined.any(axis=others)
                choices[str(dim)] = tuple(
                    str(label) for label, is_known in zip(labels, known, strict=True) if is_known
                )
        found[name] = Measure(name, rows, choices, sample)
    return found


def _count_of(attrs: Mapping[str, Any]) -> int:
    found = attrs.get("evaluations_left_out", 0)
    return int(found) if isinstance(found, (int, np.integer)) else 0


def _slices(positions: tuple[int | None, ...]) -> tuple[int | slice, ...]:
    return tuple(slice(None) if each is None else each for each in positions)


def _positions(measure: Measure, choice: Mapping[str, str]) -> tuple[int | None, ...]:
    """Of each dim the number of the chosen label, None for the rows."""
    labels = measure.labels(choice)
    found: list[int | None] = []
    for dim in map(str, measure.sample.dims):
        if dim == measure.rows:
            found.append(None)
        else:
            known = (
                measure.sample[dim].values
                if dim in measure.sample.coords
                else np.arange(measure.sample.sizes[dim])
            )
            found.append([str(label) for label in known].index(labels[dim]))
    return tuple(found)


# --- of a run that is saved


class SavedHistory(TrainingHistory):
    """The history of a run that is not written any more, or of one without live metrics.

    Parameters
    ----------
    reading : Reading
        One chain; its analysis has the metrics by step.
    curves : Dataset
        What the sums of the run give by step, see `diagnostics.training_curves`; empty where it has none.
    cells : DataArray or None
        (step, connection, cell): of `_cells_of`.
    """

    def __init__(self, reading: Reading, curves: xr.Dataset, cells: xr.DataArray | None) -> None:
        super().__init__(reading.name)
        self._reading = reading
        data = reading.analysis
        if data.sizes.get("step", 1) < curves.sizes.get("step", 1):
            data = curves  # sums of every step, and an analysis of the last one
        else:
            data = data.assign(
                {
                    name: curves[name]
                    for name in curves
                    if name not in data and curves["step"].equals(data["step"])
                }
            )
        self._data = data
        by_step = {str(name): array for name, array in data.data_vars.items() if array.dims[:1] == ("step",)}
        if cells is not None and cells.sizes["step"] == data.sizes.get("step"):
            by_step[CELLS] = cells
        # A standard error is no measure of its own, and a spectrum of every depth has no room.
        self._by_step = {
            name: array
            for name, array in by_step.items()
            if not name.endswith(("_stderr", "_null", "_error"))
            and not {"order", "quantile"} & set(array.dims)
        }
        # What an analysis of the last step alone has is no history.
        self._by_step = {
            name: array
            for name, array in self._by_step.items()
            if array.sizes["step"] > 1 and array[:-1].notnull().any()
        }
        self._measured = _measures({name: array.isel(step=-1) for name, array in self._by_step.items()})

    @classmethod
    def of(cls, reading: Reading, run: xr.DataTree) -> SavedHistory:
        """Of a reading and its opened run.

        Parameters
        ----------
        reading : Reading
            One chain.
        run : DataTree
            Its run.

        Returns
        -------
        SavedHistory
        """
        statistics = schema.chain_dataset(run, "statistics", reading.chain)
        if statistics is None or "step" not in statistics.dims:
            return cls(reading, xr.Dataset(), None)
        curves = training_curves(run, chain=reading.chain)
        kept = curves[[name for name in curves.data_vars if curves[name].dims[:1] == ("step",)]].load()
        return cls(reading, kept, _cells_of(statistics))

    @property
    def steps(self) -> np.ndarray:
        """Every measured step."""
        return np.asarray(self._data["step"].values) if "step" in self._data.dims else np.zeros(0, dtype=int)

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps at which a later attempt went on."""
        found = self._reading.attrs.get(schema.RESUMED_AT, ())
        return tuple(int(step) for step in np.atleast_1d(np.asarray(found, dtype=float)) if np.isfinite(step))

    @property
    def evaluations_left_out(self) -> int:
        """Forwards without training between the steps."""
        return _count_of(self._reading.attrs)

    @property
    def num_bytes(self) -> int:
        """Of its numbers, some of which the analysis has too."""
        return sum(array.nbytes for array in self._by_step.values())

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Everything that has numbers by step."""
        return self._measured

    def values(self, name: str, choice: Mapping[str, str]) -> np.ndarray:
        """The numbers of a measure; see `TrainingHistory.values`."""
        chosen = _slices(_positions(self._measured[name], choice))
        return np.asarray(self._by_step[name].values[(slice(None), *chosen)], dtype=np.float32)

    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step."""
        return (
            self._reading.analysis.isel(step=[position])
            if self._data is self._reading.analysis
            else (self._data.isel(step=[position]).assign_attrs(self._reading.analysis.attrs))
        )


def _cells_of(statistics: xr.Dataset) -> xr.DataArray | None:
    """(step, connection, cell): the elements of H_res, H_pre and H_post, each the mean over tokens."""
    if "h_res_sum" not in statistics:
        return None
    step, connection = statistics.sizes["step"], statistics.sizes["connection"]
    tokens = statistics["token_count"].values.reshape(step, 1, 1)
    parts, names = [], []
    for name, stem in (("h_res_sum", "H_res"), ("h_pre_sum", "H_pre"), ("h_post_sum", "H_post")):
        if name not in statistics:
            continue
        sums = statistics[name].values.reshape(step, connection, -1)
        of_known = name == "h_pre_sum" and "h_pre_token_count" in statistics
        counts = statistics["h_pre_token_count"].values[:, :, None] if of_known else tokens
        parts.append(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))
        names += cell_names(stem, statistics[name].shape[2:])
    cells = xr.DataArray(np.concatenate(parts, axis=2), dims=("step", "connection", "cell"))
    known = {
        label: statistics[label] for label in statistics.coords if statistics[label].dims == ("connection",)
    }
    return cells.assign_coords({"step": statistics["step"], "cell": names, **known})


def cell_names(stem: str, shape: tuple[int, ...]) -> list[str]:
    """What the elements of a matrix or of weights of streams are called.

    Parameters
    ----------
    stem : str
        ``"H_res"``, ``"H_pre"`` or ``"H_post"``.
    shape : tuple of int
        (stream_out, stream_in) or (stream,).

    Returns
    -------
    list of str

    Examples
    --------
    >>> cell_names("H_res", (2, 1)), cell_names("H_pre", (2,))
    (['H_res 0←0', 'H_res 1←0'], ['H_pre 0', 'H_pre 1'])
    """
    return [f"{stem} {'←'.join(map(str, index))}" for index in np.ndindex(*shape)]


# --- of a run that is written


class FollowedHistory(TrainingHistory):
    """The history of a live store with metrics by step, growing or not: `refresh` reads what is new.

    Parameters
    ----------
    reading : Reading
        One chain, for its names and what its rows do not have.
    store : FollowedStore
        Its rows.
    metrics, sums : Dataset
        What has no step in the /metrics and /statistics of the chain: nulls, and the labels of the rows.
    """

    def __init__(self, reading: Reading, store: FollowedStore, metrics: xr.Dataset, sums: xr.Dataset) -> None:
        super().__init__(reading.name)
        self._reading, self._store, self._known, self._sums = reading, store, metrics, sums
        self._metrics, self._statistics = (
            f"{group}/{reading.chain}/" if reading.chain else f"{group}/"
            for group in ("metrics", "statistics")
        )

    def refresh(self) -> bool:
        """Read new rows.

        Returns
        -------
        bool
            Whether there are any.
        """
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
        return _count_of({**self._reading.attrs, **self._store.attrs.get("", {})})

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
        sums_of: dict[str, tuple[str, ...]] = {}
        for sums in STEPWISE_SUMS:
            for name, array in curves_of_sums(last, [sums]).items():
                if name not in samples:
                    samples[str(name)], sums_of[str(name)] = array.isel(step=0), sums
        cells = _cells_of(last)
        if cells is not None:
            samples[CELLS] = cells.isel(step=0)
        return _measures(samples), sums_of

    def values(self, name: str, choice: Mapping[str, str]) -> np.ndarray:
        """The numbers of a measure; see `TrainingHistory.values`."""
        measure = self.measures[name]
        chosen = _positions(measure, choice)
        if name == CELLS:
            return self._cells(chosen[0])
        sums = self._found[1].get(name)
        if sums is None:
            return self._store.column(f"{self._metrics}{name}", chosen)
        found = curves_of_sums(self._all_sums(sums), [sums])[name].values
        return np.asarray(found[(slice(None), *_slices(chosen))], dtype=np.float32)

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
        parts = []
        for name in ("h_res_sum", "h_pre_sum", "h_post_sum"):
            full = f"{self._statistics}{name}"
            if full not in self._store.variables:
                continue
            sums = self._store.column(full, (connection,)).reshape(len(tokens), -1)
            known = f"{self._statistics}h_pre_token_count"
            of_known = name == "h_pre_sum" and known in self._store.variables
            counts = self._store.column(known, (connection,)) if of_known else tokens
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
            if full.startswith(prefix) and "/" not in full.removeprefix(prefix)
        }

    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step."""
        found = self._metrics_at(position)
        if all("step" not in array.dims for array in found.data_vars.values()):
            found = curves_of_sums(self._sums_at(position), STEPWISE_SUMS)
        return found.assign_attrs(self._reading.analysis.attrs)


def history_of(reading: Reading) -> TrainingHistory:
    """The history of a reading, from its file.

    Parameters
    ----------
    reading : Reading
        One chain of a run.

    Returns
    -------
    TrainingHistory
        One that can be refreshed, of a live store.

    Raises
    ------
    SchemaError
        Where its file is damaged.
    OSError
        Where it has gone.
    """
    path = Path(reading.path)
    run = schema.open_run(path)
    try:
        if not schema.is_live_store(path):
            return SavedHistory.of(reading, run)
        metrics, sums = (_without_step(run, group, reading.chain) for group in ("metrics", "statistics"))
        # Sums over features, which no history needs, are the largest part of it.
        kept = [name for name, array in sums.data_vars.items() if array.dims in (("weight",), ("cell",))]
        return FollowedHistory(reading, FollowedStore(path), metrics, sums[kept].assign_coords(sums.coords))
    finally:
        run.close()


def _without_step(run: xr.DataTree, group: str, chain: str) -> xr.Dataset:
    found = schema.chain_dataset(run, group, chain)
    return xr.Dataset() if found is None else found.drop_dims("step", errors="ignore").load()
