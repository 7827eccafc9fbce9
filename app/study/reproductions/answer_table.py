"""What was measured for the answer? One row a network, as a small table that the page is made from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from depthscope.app.study.reproductions.claims import Row
from depthscope.diagnostics.analysis.differences import Difference, holm, of_seeds
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments.intervals import Estimate, estimate

SETTINGS = (
    "family",
    "depth",
    "seed",
    "steps",
    "branch_scale",
    "width",
    "heads",
    "streams",
    "batch",
    "length",
)
# Of a mean of a few seeds more digits are noise.
DIGITS = 5


def table_text(rows: Sequence[Row], planned: int) -> str:
    """The rows as CSV: settings, numbers, and curves as several numbers in a cell; the first line counts what is planned."""
    lines = [
        {
            **{name: row.settings[name] for name in SETTINGS},
            **{name: f"{value:.{DIGITS}g}" for name, value in row.numbers.items()},
            **{name: " ".join(f"{value:.{DIGITS}g}" for value in line) for name, line in row.curves.items()},
        }
        for row in rows
    ]
    return f"# {planned} networks planned\n" + pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def read_table(path: Path) -> Measurements:
    """A table that `table_text` wrote.

    Raises InputError: Where the file is something else.
    """
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        planned = int(first.split()[1])
        data = pd.read_csv(io.StringIO(rest), dtype=str, keep_default_na=False)
        rows = [
            _row({str(name): str(value) for name, value in line.items()}) for line in data.to_dict("records")
        ]
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is not the table of measurements of the study answer ({error}); expected one that "
            "`depthscope study answer --out DIR --page DIR` wrote"
        ) from error
    return Measurements(rows, planned)


def _row(line: Mapping[str, str]) -> Row:
    settings: dict[str, Any] = {
        name: line[name]
        if name == "family"
        else float(line[name])
        if name == "branch_scale"
        else int(line[name])
        for name in SETTINGS
    }
    # Curves are those with spaces: of one block they would be numbers, and there are at least two.
    rest = {name: text.split() for name, text in line.items() if name not in SETTINGS}
    numbers = {name: float(parts[0]) for name, parts in rest.items() if len(parts) == 1}
    curves = {name: [float(part) for part in parts] for name, parts in rest.items() if len(parts) > 1}
    return Row(settings, numbers, curves)


@dataclass(frozen=True)
class Measurements:
    """The rows of the study.

    ``planned``: how many networks there are when all are done.
    """

    rows: Sequence[Row]
    planned: int

    @cached_property
    def steps(self) -> list[int]:
        """Of the trainings at full branch scale, the shortest first."""
        return sorted({row.settings["steps"] for row in self.rows if row.settings["branch_scale"] == 1.0})

    @cached_property
    def scales(self) -> list[float]:
        """Of the branches, of the shortest trainings, the smallest first."""
        return sorted({row.settings["branch_scale"] for row in self.rows})

    def of(self, family: str, *, steps: int | None = None, scale: float = 1.0) -> list[Row]:
        """The networks of a design, by seed.

        ``steps``: the shortest trainings by default.
        """
        settings = {"family": family, "steps": steps or self.steps[0], "branch_scale": scale}
        found = [row for row in self.rows if settings.items() <= row.settings.items()]
        return sorted(found, key=lambda row: row.settings["seed"])

    def values(self, name: str, family: str, **settings: Any) -> list[float]:
        """A number of each seed that has it."""
        found = [row.numbers.get(name, np.nan) for row in self.of(family, **settings)]
        return [value for value in found if np.isfinite(value)]

    def mean(self, name: str, family: str, **settings: Any) -> Estimate | None:
        """The mean over seeds with its interval; None where no network has the number."""
        values = self.values(name, family, **settings)
        return estimate(np.array(values)) if values else None

    def against(
        self, name: str, first: Sequence[float], others: Mapping[str, Sequence[float]]
    ) -> dict[str, tuple[Difference, float]]:
        """A number of several groups of seeds less that of the first one, tested by exchanging the labels of seeds.

        Returns: With the probability corrected for the number of groups (Holm); those of fewer than two seeds are left out.
        """
        found = {
            title: of_seeds(name, {"first": _positions(first), title: _positions(values)})
            for title, values in others.items()
            if min(len(first), len(values)) > 1
        }
        corrected = holm(np.array([float(each.p.item()) for each in found.values()]))
        return {title: (each, float(p)) for (title, each), p in zip(found.items(), corrected, strict=True)}


def _positions(values: Sequence[float]) -> list[xr.DataArray]:
    return [xr.DataArray([value], dims="depth", coords={"depth": [0]}) for value in values]
