"""How are the seeds of one experiment drawn as one curve? Their mean, in a band from the least to the greatest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from depthscope.app.figures.specification import Line, Lines

__all__ = ["folded"]


def folded(figure: Lines, experiment_of: Mapping[str, str]) -> Lines:
    """Curves of runs that belong together, as one curve with a band.

    ``experiment_of``: run → what its experiment is called; runs of the same one are put together.
    Returns: A curve for each experiment and variant; runs of different depth stay apart, and so do those of no
    experiment.
    """
    gathered: dict[tuple[str, str, int], list[Line]] = {}
    others: list[Line] = []
    for line in figure.lines:
        experiment = experiment_of.get(line.group)
        if experiment is None or line.role != "measured":
            # Nulls and laws of single runs would be drawn as often as there are seeds.
            if line.role == "threshold" or experiment is None:
                others.append(line)
            continue
        variant = line.label.removeprefix(line.group)
        gathered.setdefault((experiment, variant, len(line.x)), []).append(line)
    joined = [_joined(lines, experiment, variant) for (experiment, variant, _), lines in gathered.items()]
    counts = sorted({len(lines) for lines in gathered.values()})
    if counts[-1:] in ([], [1]):
        return figure
    note = f"Bands: from the least to the greatest of up to {counts[-1]} seeds; lines: their mean."
    return replace(figure, lines=(*joined, *others), caption=f"{figure.caption} {note}".strip())


def _joined(lines: list[Line], experiment: str, variant: str) -> Line:
    if len(lines) == 1:
        return lines[0]
    values = np.stack([np.asarray(line.y, dtype=float) for line in lines])
    known = np.isfinite(values).any(axis=0)
    # Of no numbers there is no mean, and numpy would warn.
    filled = np.where(known, values, 0.0)
    return replace(
        lines[0],
        y=np.where(known, np.nanmean(filled, axis=0), np.nan),
        lower=np.where(known, np.nanmin(filled, axis=0), np.nan),
        upper=np.where(known, np.nanmax(filled, axis=0), np.nan),
        error=None,
        label=f"{experiment}{variant}",
    )
