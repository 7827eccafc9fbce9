"""Which limits does `judge` compare a metric of these runs with? The only limits that its figure draws."""

from __future__ import annotations

import numpy as np

from depthscope.app.figures.specification import Analyses
from depthscope.diagnostics.verdicts import VERDICTS, Limits, Severity, last_step
from depthscope.diagnostics.verdicts.declaration import number

_WORDS = {Severity.INFO: "note", Severity.WARN: "warn", Severity.FAIL: "fail"}


def judged_limits(metric: str, analyses: Analyses) -> dict[str, frozenset[Limits]]:
    """The limits of every run that is judged by its values of a metric."""
    found = {}
    for run, analysis in analyses.items():
        last = last_step(analysis)
        limits = frozenset(each for verdict in VERDICTS.values() for each in verdict.limits_on(metric, last))
        if limits:
            found[run] = limits
    return found


def limit_labels(judged: dict[str, frozenset[Limits]]) -> list[tuple[float, str]]:
    """Every limit with its label, such as ``warn: 10``, once."""
    levels = {
        (value, f"{_WORDS[severity]}: {number(value)}")
        for limits in judged.values()
        for each in limits
        for severity, value in each.levels
    }
    return sorted(levels)


def passing_range(judged: dict[str, frozenset[Limits]]) -> tuple[float, float] | None:
    """The values that no verdict reports, ±inf where it is open."""
    if len(set(judged.values())) != 1:
        return None
    (limits,) = set(judged.values())
    ends = [(each.levels[0][1], each.above) for each in limits]
    low = max((value for value, above in ends if not above), default=-np.inf)
    high = min((value for value, above in ends if above), default=np.inf)
    return (low, high) if low < high else None
