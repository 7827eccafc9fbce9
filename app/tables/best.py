"""Which of some numbers is the best? As the declaration of the metric says, and only where the numbers can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE

__all__ = ["best_of"]


def best_of(metric: str, values: Sequence[float], margins: Sequence[float], *, better: str = "") -> set[int]:
    """Which of some numbers are the best: the extreme one, and those that are not told apart from it.

    Parameters
    ----------
    metric : str
        Name in the catalogue, whose declaration says what is better.
    values, margins : sequence of float
        Numbers, and half of their intervals; NaN where there is none.
    better : str
        In place of the declared direction.

    Returns
    -------
    set of int
        Empty where the metric says of no number that it is better, and where all are alike.
    """
    better = better or (CATALOGUE[metric].better if metric in CATALOGUE else "")
    known = [place for place, value in enumerate(values) if math.isfinite(value)]
    if not better or len(known) < 2:
        return set()
    worse = {place: _worse(values[place], better) for place in known}
    first = min(known, key=worse.__getitem__)
    alike = {
        place
        for place in known
        # Independent intervals add as squares; without any, only equal numbers are alike.
        if abs(values[place] - values[first]) <= math.hypot(*(_or_zero(margins[i]) for i in (place, first)))
        # Of two that are printed alike a reader cannot see why one is better.
        or number(values[place]) == number(values[first])
    }
    return alike if len(alike) < len(known) else set()


def _worse(value: float, better: str) -> float:
    """Grows as a number gets worse."""
    if better == "nearer 1":
        # A gain of 2 is as far from 1 as one of a half.
        return abs(math.log(abs(value))) if value else math.inf
    return -value if better == "higher" else value


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
