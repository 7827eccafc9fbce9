"""Which of the chosen runs belong together, such as the seeds of one design? The visitor chooses the attribute they share."""

from __future__ import annotations

from collections.abc import Sequence

from depthscope.app.dashboard.components.choices import choose_one
from depthscope.app.readings.readings import Reading

__all__ = ["choose_group", "groups_of"]

SEED = "seed"

SINGLE_RUNS = "single runs"


def choose_group(readings: Sequence[Reading], label: str, key: str) -> tuple[str | None, dict[str, str]]:
    """The attribute whose groups are shown, and the group of each run; None and no groups for single runs."""
    names = groups_of(readings)
    if not names:
        return None, {}
    by = choose_one(
        label, [SINGLE_RUNS, *names], key, words=lambda n: n if n == SINGLE_RUNS else f"by {n}", width=200
    )
    if by == SINGLE_RUNS:
        return None, {}
    return by, {reading.name: str(reading.attrs[by]) for reading in readings}


def groups_of(readings: Sequence[Reading]) -> list[str]:
    """Attributes that make groups of the runs, of which at least one has several runs, such as the seeds of a family."""
    shared = set.intersection(*(set(reading.attrs) for reading in readings)) if readings else set()
    found = []
    for name in sorted(shared - {SEED, "created", "data_digest", "weights_digest"}):
        values = [reading.attrs[name] for reading in readings]
        if all(isinstance(value, (str, int, float)) for value in values):
            different = set(map(str, values))
            if 1 < len(different) < len(values):
                found.append(name)
    return found
