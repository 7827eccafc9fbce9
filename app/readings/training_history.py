"""What did a training measure, step by step? Its numbers by step, whatever they are read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.quantities.registry import ROW_FACTS
from depthscope.diagnostics.schema import Status

CELLS = "connection_cells"
"""The elements of H_res, H_pre and H_post of a connection, in the mean over tokens."""

DRIFT = "connection_parameter_drift"

ROWS = ("cell", "depth", "connection", "weight", "parameter")
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

    name: str  # in the catalogue, or `CELLS` or `DRIFT`, or of a number such as ``loss``
    rows: str  # its dim of `ROWS`; empty for one number a step
    choices: Mapping[str, tuple[str, ...]]  # the labels of its other dims under which it has numbers
    sample: xr.DataArray  # the last step, with all coordinates

    def labels(self, choice: Mapping[str, str]) -> dict[str, str]:
        """The label of every dim but the rows.

        ``choice``: what is asked for; a label that it does not have gives the preferred one.
        """
        found = {}
        for dim, labels in self.choices.items():
            wanted = (choice.get(dim), PREFERRED.get(dim), labels[0])
            found[dim] = next(label for label in wanted if label in labels)
        return found


class TrainingHistory(ABC):
    """The numbers of one chain of a run, by step.

    ``name``: of the reading.
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

        Returns: (step, row), or (step,) for one number a step.
        """

    @abstractmethod
    def analysis_at(self, position: int) -> xr.Dataset:
        """All metrics of one step, as an analysis of it, which verdicts can judge."""


class UntilStep(TrainingHistory):
    """A history without what came after a step.

    ``history``: perhaps one that grows.
    ``step``: the last step that is seen.
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
                labels = sample[dim].values if dim in sample.coords else np.arange(sample.sizes[dim])
                known = defined.any(axis=others)
                choices[str(dim)] = tuple(
                    str(label) for label, is_known in zip(labels, known, strict=True) if is_known
                )
        found[name] = Measure(name, rows, choices, sample)
    return found


def count_of(attrs: Mapping[str, Any]) -> int:
    """Evaluations between the steps of a recording, which count to none of them."""
    found = attrs.get("evaluations_left_out", 0)
    return int(found) if isinstance(found, (int, np.integer)) else 0


def slices_of(positions: tuple[int | None, ...]) -> tuple[int | slice, ...]:
    """The same as an index of an array."""
    return tuple(slice(None) if each is None else each for each in positions)


def positions_of(measure: Measure, choice: Mapping[str, str]) -> tuple[int | None, ...]:
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
