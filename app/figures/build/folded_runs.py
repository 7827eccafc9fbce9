"""How are the seeds of one experiment drawn as one curve? Their mean in a band, with the interval of that mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from depthscope.app.figures.specification import Line, Lines
from depthscope.diagnostics.metrics.intervals import LEVEL, factor

FEWEST = 3
"""Runs from which the mean has an interval: of two it reaches 13 standard errors to each side."""


def folded(figure: Lines, group_of: Mapping[str, str]) -> Lines:
    """Curves of runs that belong together, as one curve with a band.

    ``group_of``: run → what its group is called; a run that is missing stays as it is.
    Returns: A curve for each group and variant, in the colour of the first run of the group; runs that were measured at
    other positions than the first ones of their group stay single curves.
    """
    gathered: dict[tuple[str, str, bytes], list[Line]] = {}
    others: list[Line] = []
    for line in figure.lines:
        group = group_of.get(line.group)
        if line.role == "threshold" or group is None:
            others.append(line)
        elif line.role == "measured":  # nulls of single runs would be drawn as often as there are seeds
            variant = line.label.removeprefix(line.group)
            gathered.setdefault((group, variant, np.asarray(line.x, dtype=float).tobytes()), []).append(line)
    most = max((len(lines) for lines in gathered.values()), default=0)
    if most < 2:
        return figure
    joined = [_joined(lines, group, variant) for (group, variant, _), lines in gathered.items()]
    note = f"Lines: the mean of up to {most} runs; bands: from the smallest to the largest of them."
    if any(line.error is not None for line in joined):
        note += f" Whiskers: {100 * LEVEL:g} % interval of the mean over runs."
    return replace(
        figure,
        lines=(*joined, *others),
        caption=f"{note} {figure.caption}".strip(),
        runs=folded_colours(figure.runs, group_of),
    )


def folded_colours(runs: Mapping[str, int], group_of: Mapping[str, str]) -> dict[str, int]:
    """The number of the colour of each group: that of its first run."""
    found: dict[str, int] = {}
    for run, number in runs.items():
        found.setdefault(group_of.get(run, run), number)
    return found


def _joined(lines: list[Line], group: str, variant: str) -> Line:
    name = f"{group}{variant}"
    if len(lines) == 1:
        return replace(lines[0], label=name, group=group)
    values = np.stack([np.asarray(line.y, dtype=float) for line in lines])
    is_known = np.isfinite(values)
    counts = is_known.sum(axis=0)
    # Of no numbers there is no mean, and numpy would warn.
    mean = np.where(counts > 0, np.where(is_known, values, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)
    low, high = (
        np.where(counts > 0, reduce(np.where(is_known, values, fill), axis=0), np.nan)
        for reduce, fill in ((np.min, np.inf), (np.max, -np.inf))
    )
    squares = (np.where(is_known, values - mean, 0.0) ** 2).sum(axis=0)
    degrees = np.maximum(counts - 1, 1)
    reach = np.array([factor(each) for each in degrees]) * np.sqrt(squares / degrees / np.maximum(counts, 1))
    error = np.where(counts >= FEWEST, reach, np.nan) if len(lines) >= FEWEST else None
    return replace(lines[0], y=mean, lower=low, upper=high, error=error, label=name, group=group)
