"""How is the history of a run read that is not written any more? From its analysis and its sums."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.readings.training_history import (
    CELLS,
    Measure,
    TrainingHistory,
    count_of,
    measures_of,
    positions_of,
    slices_of,
)
from depthscope.diagnostics import schema, training_curves


class SavedHistory(TrainingHistory):
    """The history of a run that is not written any more, or of one without live metrics.

    ``reading``: one chain; its analysis has the metrics by step.
    ``curves``: what the sums of the run give by step, see `diagnostics.training_curves`; empty where it has none.
    ``cells``: (step, connection, cell): of `_cells_of`.
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
        self._measured = measures_of({name: array.isel(step=-1) for name, array in self._by_step.items()})

    @classmethod
    def of(cls, reading: Reading, statistics: xr.Dataset) -> SavedHistory:
        """Of a reading and the statistics of several steps of its chain."""
        curves = curves_of(statistics)
        by_step = [name for name in curves.data_vars if curves[name].dims[:1] == ("step",)]
        return cls(reading, curves[by_step], cells_of(statistics))

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
        return count_of(self._reading.attrs)

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
        chosen = slices_of(positions_of(self._measured[name], choice))
        return np.asarray(self._by_step[name].values[(slice(None), *chosen)], dtype=np.float32)

    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step."""
        return (
            self._reading.analysis.isel(step=[position])
            if self._data is self._reading.analysis
            else (self._data.isel(step=[position]).assign_attrs(self._reading.analysis.attrs))
        )


def curves_of(statistics: xr.Dataset) -> xr.Dataset:
    """What sums of every step give, see `diagnostics.training_curves`."""
    return training_curves(xr.DataTree.from_dict({"statistics": statistics})).load()


def cells_of(statistics: xr.Dataset) -> xr.DataArray | None:
    """The elements of H_res, H_pre and H_post, each the mean over tokens."""
    if "h_res_sum" not in statistics:
        return None
    step, connection = statistics.sizes["step"], statistics.sizes["connection"]
    tokens = statistics["token_count"].values.reshape(step, 1, 1)
    parts, names = [], []
    for of in schema.SUMMED:
        if of.total not in statistics:
            continue
        sums = statistics[of.total].values.reshape(step, connection, -1)
        of_some = of.counted_by != "token_count" and of.counted_by in statistics
        counts = statistics[of.counted_by].values[:, :, None] if of_some else tokens
        parts.append(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))
        names += cell_names(of.symbol, statistics[of.total].shape[2:])
    cells = xr.DataArray(np.concatenate(parts, axis=2), dims=("step", "connection", "cell"))
    known = {
        label: statistics[label] for label in statistics.coords if statistics[label].dims == ("connection",)
    }
    return cells.assign_coords({"step": statistics["step"], "cell": names, **known})


def cell_names(stem: str, shape: tuple[int, ...]) -> list[str]:
    """What the elements of a matrix or of weights of streams are called.

    Examples
    --------
    >>> cell_names("H_res", (2, 1)), cell_names("H_pre", (2,))
    (['H_res 0←0', 'H_res 1←0'], ['H_pre 0', 'H_pre 1'])
    """
    return [f"{stem} {'←'.join(map(str, index))}" for index in np.ndindex(*shape)]
