"""Were the goals met? Each is a number computed from the results, and a limit for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.analysis.measure import NO_DATA

Rows = dict[str, dict[str, Any]]
OWN = "depthscope, numpy"


class NotMeasuredError(Exception):
    """Why there is no number."""


@dataclass(frozen=True)
class Goal:
    """An upper or lower limit for a number computed from the results.

    ``text``: the goal in words.
    ``comparison``: the comparison from whose rows the number is computed.
    ``found``: from the rows of that comparison to the number.
    ``limit``: the largest number that meets the goal.
    ``least``: whether the limit is the smallest instead.
    """

    text: str
    comparison: str
    found: Callable[[Rows], float]
    limit: float
    least: bool = False

    def judged(self, results: dict[str, Any]) -> dict[str, Any]:
        """The number, its limit, and whether it is met; None and a reason where it was not measured."""
        row = {"text": self.text, "limit": self.limit, "least": self.least, "found": None, "met": None}
        if self.comparison not in results:
            # A goal that was not measured is neither met nor missed: `met` stays None.
            return row | {"reason": "not asked in this run"}
        try:
            number = self.found(results[self.comparison]["rows"])
        except NotMeasuredError as reason:
            return row | {"reason": str(reason)}
        return row | {"found": number, "met": number >= self.limit if self.least else number <= self.limit}


def cells(rows: Rows, tool: str, part: str) -> list[str]:
    """Variants or sizes at which a tool was measured; refused where there are none."""
    row = rows.get(tool, {})
    found = row.get(part, {})
    # Where the machine lacks data, as without the package of SmolLM2, the other variants still count.
    known = [key for key, cell in found.items() if not (isinstance(cell, str) and cell.startswith(NO_DATA))]
    if not known:
        raise NotMeasuredError(row.get("reason", "not asked"))
    return known


def number(rows: Rows, tool: str, part: str, key: str) -> Any:
    """A cell of the results, refused where it is a reason."""
    row = rows.get(tool, {})
    cell = row.get(part, {}).get(key, row.get("reason", "not asked"))
    if isinstance(cell, str):
        raise NotMeasuredError(cell)
    # Cells of times are dicts, with a reason where the tool failed; cells of errors are numbers or reasons.
    if isinstance(cell, dict) and "ratio" not in cell:
        raise NotMeasuredError(cell.get("reason", "not timed"))
    return cell


def worst_error(tool: str) -> Callable[[Rows], float]:
    """The largest of a tool's errors; NaN, which max would skip, counts as the largest."""
    return lambda rows: float(
        np.max([number(rows, tool, "errors", key) for key in cells(rows, tool, "errors")])
    )


def largest(rows: Rows, of: str) -> str:
    """The last of the sizes at which a tool was timed."""
    # Sizes are declared from small to large.
    return cells(rows, of, "times")[-1]


def slower(tools: Iterable[str], *, by: str = OWN) -> Callable[[Rows], float]:
    """How many times the baseline's time the fastest of some tools takes at the largest size."""
    # The fastest peer counts: a goal that compares with a slow one would be met too easily.
    return lambda rows: min(number(rows, tool, "times", largest(rows, by))["ratio"] for tool in tools)


def ratio(tool: str, *, sizes: str = "") -> Callable[[Rows], float]:
    """The largest ratio of a tool to the baseline, over sizes that begin so."""
    return lambda rows: max(
        number(rows, tool, "times", size)["ratio"]
        for size in cells(rows, tool, "times")
        if size.startswith(sizes)
    )


def times_faster(tool: str) -> Callable[[Rows], float]:
    """How many times less than the baseline a tool takes, at the worst size."""
    return lambda rows: 1.0 / ratio(tool)(rows)


def share_of_memory(tool: str, other: str) -> Callable[[Rows], float]:
    """Peak memory of a tool over that of another at the largest size."""

    def found(rows: Rows) -> float:
        size = largest(rows, tool)
        mine, theirs = (number(rows, name, "times", size)["peak"] for name in (tool, other))
        return mine / theirs

    return found


MEASURED = "capture and every default metric"
GOALS = (
    Goal("exact CKA: error at any offset", "cka", worst_error(OWN), 1e-6),
    Goal(
        "exact CKA: × faster than torch-cka, cka-pytorch and ckatorch",
        "cka",
        slower(("torch-cka", "cka-pytorch", "ckatorch cka_base")),
        60,
        least=True,
    ),
    Goal("exact CKA: × faster than netrep", "cka", slower(["netrep LinearCKA"]), 15, least=True),
    Goal("exact CKA: × faster than pytorch-cka", "cka", slower(["pytorch-cka"]), 2, least=True),
    Goal("exact CKA: memory, as a share of pytorch-cka's", "cka", share_of_memory(OWN, "pytorch-cka"), 0.25),
    Goal("effective rank: worst relative error", "ranks", worst_error(OWN), 1e-6),
    Goal(
        "effective rank: time over a float32 Gram's, harmless condition",
        "ranks",
        ratio(OWN, sizes="noise"),
        1.3,
    ),
    *(
        Goal(
            f"singular values, n = {n}: × faster than torch svdvals, worst kind",
            f"singular values {n}",
            times_faster(OWN),
            3,
            least=True,
        )
        for n in (2, 3, 4)
    ),
    Goal(
        "measured step with every default metric, residual: over plain",
        "training step, residual",
        ratio(MEASURED),
        1.12,
    ),
    Goal(
        "measured step with every default metric, mHC: over plain",
        "training step, mHC",
        ratio(MEASURED),
        1.12,
    ),
    Goal("evaluation, every token: over plain", "evaluation", ratio("statistics"), 1.05),
)


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was found.

    ``results``: comparison to its title and rows.
    """
    return [goal.judged(results) for goal in GOALS]
