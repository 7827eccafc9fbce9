"""Which runs have which verdicts? Runs are rows, verdicts are columns named for health; seeds fold into one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from depthscope.app.readings.kept_readings import Summary
from depthscope.app.readings.standings import DOES_NOT_APPLY, NOT_JUDGED, Standing, counts_words
from depthscope.app.tables.tables import spoken
from depthscope.app.text.health import healthy_name
from depthscope.diagnostics import Severity
from depthscope.diagnostics.verdicts import ABOUT_THE_RUN, VERDICTS

SIGNS = {"FAIL": "✕", "WARN": "▲", "INFO": "●", "PASS": "✓", NOT_JUDGED: "–", DOES_NOT_APPLY: "∅"}
"""State → sign: colours alone are the same to some readers."""

MOST_VALUES = 24
"""An attribute with more values than this, such as a digest, groups nothing."""

SEED = "seed"

STATUS = "status"
"""Column of the runs that are written step by step."""

FOUNDING = "same_representation"
"""The verdict whose column is always there, also where every run passes it."""

SHARED = ("model", "family", "n_streams", "num_blocks", "num_parameters", "block", "dtype", "data")
"""Attributes in which the seeds of one experiment agree."""


OTHERS = "other verdicts"
"""Column of all verdicts that have none of their own."""

MILD = ("PASS", NOT_JUDGED, DOES_NOT_APPLY)
"""States without a finding: of several seeds the first of these that one has stands for all."""

MOST_NOTED = 2
"""Notes that the column names: a cell is one line."""


@dataclass(frozen=True)
class VerdictTable:
    """A table of verdicts, ready to be drawn.

    ``cells``: what is printed: run, group, worst, one column a verdict that is not met everywhere, and the others as
    a count.
    ``states``: the state behind each cell, of the same shape; empty where a cell is no verdict.
    ``runs``: the runs of each row.
    ``depths``: column → the depth at which to open it, for each row.
    ``worst``: the worst finding of each row, about the network where there is one.
    ``verdicts``: column → verdict.
    """

    cells: pd.DataFrame
    states: pd.DataFrame
    runs: list[list[str]]
    depths: list[dict[str, int]]
    worst: list[Standing | None]
    verdicts: dict[str, str]


def groupable(summaries: Sequence[Summary]) -> list[str]:
    """Attributes by which runs can be grouped: few plain values that differ."""
    found: dict[str, set[Any]] = {}
    for summary in summaries:
        for name, value in plain_attributes(summary.attrs).items():
            found.setdefault(name, set()).add(value)
    return sorted(name for name, values in found.items() if 1 < len(values) <= MOST_VALUES)


def plain_attributes(attrs: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Attributes that are one word or number, and those in a mapping such as a configuration.

    Returns: A value in a mapping has the name ``mapping.name``.

    Examples
    --------
    >>> plain_attributes({"family": "mhc", "config": {"lr": 0.1, "layers": [1, 2]}})
    {'family': 'mhc', 'config.lr': 0.1}
    """
    found: dict[str, str | int | float | bool] = {}
    for name, value in attrs.items():
        parts = (
            {f"{name}.{part}": each for part, each in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
        found |= {str(key): each for key, each in parts.items() if isinstance(each, (str, int, float, bool))}
    return found


def has_seeds(summaries: Sequence[Summary]) -> bool:
    """Whether some runs differ in their seed alone."""
    return len(_by_experiment(summaries)) < len(summaries)


def experiments_of(summaries: Sequence[Summary]) -> dict[str, str]:
    """The experiment of each run of which there are several seeds.

    Returns: Run → ``NAME and 2 more seeds``.
    """
    return {
        summary.name: _row_name(row) for row in _by_experiment(summaries) if len(row) > 1 for summary in row
    }


def _row_name(row: Sequence[Summary]) -> str:
    return row[0].name if len(row) == 1 else f"{row[0].name} and {len(row) - 1} more seeds"


def verdict_table(
    summaries: Sequence[Summary],
    *,
    group_by: str | None = None,
    fold_seeds: bool = False,
    statuses: Mapping[str, str] | None = None,
) -> VerdictTable:
    """The table of some runs.

    ``group_by``: an attribute: its values are a column, and its rows are next to each other.
    ``fold_seeds``: one row for all seeds of an experiment: its cells say in how many of them.
    ``statuses``: what is said of runs that are or were written step by step, by their names; a column where there is
    any.
    """
    rows = _by_experiment(summaries) if fold_seeds else [[summary] for summary in summaries]
    shown = _told_verdicts(summaries)
    rows.sort(key=lambda row: (_group(row, group_by), _badness(row), row[0].name))
    cells, states, depths = [], [], []
    for row in rows:
        printed, behind, opened = _row(row, shown, group_by)
        if statuses:
            printed[STATUS] = (
                ", ".join(statuses[each.name] for each in row if each.name in statuses) or "saved"
            )
        cells.append(printed)
        states.append(behind)
        depths.append(opened)
    columns = [
        "run",
        *([STATUS] if statuses else []),
        *([group_by] if group_by else []),
        *map(healthy_name, shown),
        OTHERS,
    ]
    return VerdictTable(
        pd.DataFrame(cells, columns=columns),
        pd.DataFrame(states, columns=columns).fillna(""),
        [[summary.name for summary in row] for row in rows],
        depths,
        [_worst(row) for row in rows],
        {healthy_name(name): name for name in shown},
    )


def _worst(row: Sequence[Summary]) -> Standing | None:
    """The worst finding of a row; notes about the reading only where there is nothing else."""
    found = [
        (_severity(standing), name not in ABOUT_THE_RUN, standing)
        for summary in row
        for name, standing in summary.standings.items()
        if standing.finding is not None and _severity(standing)
    ]
    return max(found, key=lambda each: each[:2])[2] if found else None


def _by_experiment(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """Runs that differ in their seed alone, together; a run without a seed is alone."""
    found: dict[Any, list[Summary]] = {}
    for number, summary in enumerate(summaries):
        known = tuple(repr(summary.attrs.get(name)) for name in SHARED)
        key = (known, summary.depths) if SEED in summary.attrs else number
        found.setdefault(key, []).append(summary)
    experiments = []
    for runs in found.values():
        seeds = [repr(run.attrs.get(SEED)) for run in runs]
        # Two runs of one seed differ in something else, such as their training: they stay apart.
        experiments += [runs] if len(set(seeds)) == len(runs) else [[run] for run in runs]
    return experiments


def _told_verdicts(summaries: Sequence[Summary]) -> list[str]:
    """The founding verdict, and those with a failure or warning in some run, the worst first."""
    worst = {
        name: max(
            (_severity(summary.standings[name]) for summary in summaries if name in summary.standings),
            default=0,
        )
        for name in VERDICTS
    }
    faults = [name for name, severity in worst.items() if severity >= Severity.WARN and name != FOUNDING]
    return [FOUNDING, *sorted(faults, key=lambda name: -worst[name])]


def _severity(standing: Standing) -> int:
    return int(Severity[standing.state]) if standing.state in Severity.__members__ else 0


def _badness(row: Sequence[Summary]) -> tuple[int, ...]:
    """Sort key: the number of failures, then warnings, most first."""
    states = [standing.state for summary in row for standing in summary.standings.values()]
    return tuple(-states.count(state) * 1000 // len(row) for state in ("FAIL", "WARN", "INFO"))


def _group(row: Sequence[Summary], group_by: str | None) -> str:
    return str(plain_attributes(row[0].attrs).get(group_by, "–")) if group_by else ""


def _row(
    row: Sequence[Summary], shown: Sequence[str], group_by: str | None
) -> tuple[dict[str, str], dict[str, str], dict[str, int]]:
    printed, behind, opened = {"run": _row_name(row)}, {}, {}
    if group_by:
        printed[group_by] = _group(row, group_by)
    for name in shown:
        found = [summary.standings.get(name, Standing(NOT_JUDGED)) for summary in row]
        worst = max(found, key=_severity)
        if not _severity(worst):
            worst = min(found, key=lambda each: MILD.index(each.state))
        column = healthy_name(name)
        printed[column] = _cell(worst, found)
        behind[column] = worst.state
        if worst.depth is not None:
            opened[column] = worst.depth
    printed[OTHERS] = _other_words(row, shown)
    return printed, behind, opened


def _cell(worst: Standing, found: Sequence[Standing]) -> str:
    """Sign and place, and in how many seeds."""
    sign = SIGNS[worst.state]
    if worst.state in ("PASS", NOT_JUDGED, DOES_NOT_APPLY) or worst.finding is None:
        return sign
    parts = [sign]
    if worst.finding.axis != "run" and worst.finding.first >= 0:
        first, last = worst.finding.first, worst.finding.last
        place = f"{first}" if first == last else f"{first}–{last}"
        parts.append(place if worst.finding.axis == "depth" else f"{worst.finding.axis} {place}")
    if len(found) > 1:
        parts.append(f"({sum(each.state == worst.state for each in found)} of {len(found)})")
    return " ".join(parts)


def _other_words(row: Sequence[Summary], shown: Sequence[str]) -> str:
    """The names of what was noted elsewhere, the first ones, and the counts of all verdicts as the terminal has them."""
    noted = dict.fromkeys(
        spoken(name)
        for summary in row
        for name, standing in summary.standings.items()
        if standing.state == "INFO" and name not in shown and name not in ABOUT_THE_RUN
    )
    names = [*noted][:MOST_NOTED] + ([f"{len(noted) - MOST_NOTED} more"] if len(noted) > MOST_NOTED else [])
    # Of the seeds of one experiment every run has its own.
    counts = dict.fromkeys(counts_words(summary.standings.values()) for summary in row)
    return "; ".join([*([f"{SIGNS['INFO']} {', '.join(names)}"] if names else []), " / ".join(counts)])
