"""Which of some numbers is the best? As its metric declares, and only where numbers differ by more than their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from depthscope.app.figures.build.values import pick
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE


def best_of(
    metric: str,
    values: Sequence[float],
    margins: Sequence[float],
    nulls: Sequence[float],
) -> set[int]:
    """Which of some numbers are the best: the extreme one, and those that do not differ from it.

    ``metric``: name in the catalogue, whose declaration has which is better.
    ``values, margins, nulls``: numbers, half of their intervals, and what noise would give; NaN where there is none.
    Returns: Empty where no number of the metric is better, where all are equal, where one of them has no interval to test
    it by, and where nulls differ: a rank of 107 where noise has 240 is no better than one of 15 where it has 84.
    """
    better = CATALOGUE[metric].better if metric in CATALOGUE else ""
    known = [place for place, value in enumerate(values) if math.isfinite(value)]
    if not better or len(known) < 2 or not are_comparable([nulls[place] for place in known]):
        return set()
    if not all(math.isfinite(margins[place]) for place in known):
        return set()
    worse = {place: _worse(values[place], better) for place in known}
    first = min(known, key=worse.__getitem__)
    equal = {
        place
        for place in known
        # Independent intervals add as squares.
        if abs(values[place] - values[first]) <= math.hypot(margins[place], margins[first])
        # Of two that are printed the same a reader cannot see why one is better.
        or number(values[place]) == number(values[first])
    }
    return equal if len(equal) < len(known) else set()


def are_comparable(nulls: Sequence[float]) -> bool:
    """Whether numbers have the same null, or none of them has one."""
    unknown = {math.isnan(null) for null in nulls}
    return unknown == {True} or (
        unknown == {False} and all(math.isclose(null, nulls[0], rel_tol=1e-6) for null in nulls)
    )


def why_not_ranked(readings: Sequence[Reading], view: Selection) -> str:
    """Why no number of some runs may be called the best: numbers of other text or of more tokens are no better or worse.

    Returns: Empty where all have read the same text, and as many tokens.
    """
    digests = {reading.name: reading.attrs.get("data_digest") for reading in readings}
    unknown = [run for run, digest in digests.items() if digest is None]
    counts = [pick(reading.analysis, "num_tokens", view, stream="mean") for reading in readings]
    sizes = {float(count.max()) if count is not None else math.nan for count in counts}
    reasons = [
        f"the text of {', '.join(unknown)} is not known" if unknown else "",
        "the runs have read different texts" if len(set(digests.values()) - {None}) > 1 else "",
        "their numbers of tokens differ" if len(sizes) > 1 else "",
    ]
    return ", and ".join(filter(None, reasons)) if len(readings) > 1 else ""


def _worse(value: float, better: str) -> float:
    """Grows as a number gets worse."""
    if better == "nearer 1":
        # A gain of 2 is as far from 1 as one of a half.
        return abs(math.log(abs(value))) if value else math.inf
    return -value if better == "higher" else value
