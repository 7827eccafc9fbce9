"""What do the numbers after ± mean? Intervals over sequences; of several kinds, each with its runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import xarray as xr

from depthscope.diagnostics.metrics.intervals import margin

__all__ = ["NamedError", "interval_words"]


class NamedError(NamedTuple):
    """A standard error with the run and the metric that it is of."""

    run: str
    metric: str
    error: xr.DataArray | None


def interval_words(errors: Iterable[NamedError]) -> str:
    """What intervals some numbers have; where they are not all of one kind, with the runs or the metrics of each.

    Parameters
    ----------
    errors : iterable of NamedError
        Of everything that is shown.

    Returns
    -------
    str
        Such as "half of a 95 % interval (Student's t over 8 sequences)"; empty where nothing has an error.
    """
    kinds: dict[str, list[NamedError]] = {}
    for each in errors:
        if each.error is not None and bool(each.error.notnull().any()):
            kinds.setdefault(margin(each.error)[1], []).append(each)
    if len(kinds) < 2:
        return next(iter(kinds), "")
    runs = [{each.run for each in of_kind} for of_kind in kinds.values()]
    # Of one run, or where a run has several kinds, metrics tell them apart.
    by_run = sum(map(len, runs)) == len(set().union(*runs))
    return ", ".join(
        f"{words} for {', '.join(dict.fromkeys(each.run if by_run else each.metric for each in of_kind))}"
        for words, of_kind in kinds.items()
    )
