"""What do the numbers after ± mean? Intervals over sequences; of several kinds, each with its runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import xarray as xr

from depthscope.diagnostics.metrics.intervals import margin


class NamedError(NamedTuple):
    """A standard error with the run and the metric that it is of."""

    run: str
    metric: str
    error: xr.DataArray | None


def interval_words(errors: Iterable[NamedError]) -> str:
    """What intervals some numbers have; where they are not all of one kind, with the runs or the metrics of each.

    Returns: Such as "half of a 95 % interval (Student's t over 8 sequences)"; empty where nothing has an error.
    """
    kinds: dict[str, dict[str, dict[str, None]]] = {}
    for run, metric, error in errors:
        if error is not None and bool(error.notnull().any()):
            kinds.setdefault(margin(error)[1], {}).setdefault(run, {})[metric] = None
    if len(kinds) < 2:
        return next(iter(kinds), "")
    runs = [run for of_kind in kinds.values() for run in of_kind]
    return ", ".join(f"{words} for {_whose(of_kind, runs)}" for words, of_kind in kinds.items())


def _whose(metrics: Mapping[str, Collection[str]], runs: Sequence[str]) -> str:
    """The runs of one kind of interval; of a run that has several kinds, with the metrics."""
    if len(set(runs)) == 1:
        return ", ".join(*metrics.values())
    return ", ".join(
        run if runs.count(run) == 1 else f"{run} ({', '.join(names)})" for run, names in metrics.items()
    )
