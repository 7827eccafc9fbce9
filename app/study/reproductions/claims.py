"""Was a claim reproduced? A number for each seed, its interval, and the limit that it has to pass."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from depthscope.diagnostics.experiments.intervals import Estimate, estimate

Verdict = Literal["reproduced", "not reproduced", "not decided"]


@dataclass(frozen=True)
class Row:
    """What is saved of a cell.

    ``settings``: of the cell.
    ``numbers``: NaN is undefined.
    ``curves``: along the network.
    """

    settings: Mapping[str, Any]
    numbers: Mapping[str, float]
    curves: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Claim:
    """A statement with the number that decides it.

    ``statement``: what is claimed, as a sentence without its full stop; ``{depth}`` is replaced by the largest number of
    layers.
    ``source``: where it is claimed; «this project» where the test is ours.
    ``measured``: what the number is.
    ``values``: one for each seed; NaN is unknown and does not count. In the table of a study: what takes them from
    its networks.
    ``above, below``: where the number is if the claim holds: above the one and below the other.
    ``exact``: the number does not depend on chance: one value decides.
    """

    statement: str
    source: str
    measured: str
    values: Any = ()
    above: float = -math.inf
    below: float = math.inf
    exact: bool = False

    @property
    def found(self) -> Estimate:
        """Mean over seeds with Student's interval."""
        values = [value for value in self.values if math.isfinite(value)]
        return estimate(np.array(values)) if values else Estimate(math.nan, math.nan, math.nan, math.nan, 0)

    @property
    def verdict(self) -> Verdict:
        """Reproduced where all of the interval is inside the limits, not where all of it is outside, else undecided."""
        found = self.found
        low, high = (found.mean, found.mean) if self.exact else (found.low, found.high)
        if not (math.isfinite(low) and math.isfinite(high)):
            return "not decided"
        if low > self.above and high < self.below:
            return "reproduced"
        return "not reproduced" if high <= self.above or low >= self.below else "not decided"

    @property
    def sentence(self) -> str:
        """The verdict, the statement, the number and the limit."""
        return f"{self.statement}: {self.verdict} ({self.measured} {self._number}; {self._limit}; {self.source})."

    def as_dict(self) -> dict[str, Any]:
        """Verdict, statement, number and limits with plain values; None is undefined or no limit."""
        found = self.found
        numbers = {
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "above": self.above,
            "below": self.below,
        }
        return {
            "verdict": self.verdict,
            "claim": self.statement,
            "measured": self.measured,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "seeds": found.sequences,
            "source": self.source,
        }

    @property
    def _number(self) -> str:
        found = self.found
        if not found.sequences:
            return "not known: no network gave it"
        if self.exact:
            return f"{found.mean:.3g}"
        if found.sequences == 1:
            return f"{found.mean:.3g} from one seed, which has no interval"
        return f"{found.mean:.3g}, 95 % {found.low:.3g} to {found.high:.3g} over {found.sequences} seeds"

    @property
    def _limit(self) -> str:
        parts = [f"above {self.above:.3g}"] if math.isfinite(self.above) else []
        parts += [f"below {self.below:.3g}"] if math.isfinite(self.below) else []
        return f"expected {' and '.join(parts)}"


def tested(table: Sequence[Claim], rows: Sequence[Row]) -> list[Claim]:
    """The claims of a table, with the numbers of some networks."""
    networks = Networks(rows)
    return [
        replace(
            claim,
            statement=claim.statement.format(depth=networks.depth),
            values=tuple(claim.values(networks)),
        )
        for claim in table
    ]


def deepest(rows: Sequence[Row]) -> int:
    """The largest depth of some rows; 0 of none."""
    return max((int(row.settings["depth"]) for row in rows), default=0)


# Settings by which the networks of a study are laid out; the others are those of a variant.
LAID_OUT = ("family", "depth", "seed")


def by_variant(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows whose settings differ in family, depth and seed alone, together, in the order of the first of each.

    Returns: With those settings in which the variants differ.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(sorted((name, value) for name, value in row.settings.items() if name not in LAID_OUT))
        found.setdefault(key, []).append(row)
    shared = set.intersection(*map(set, found)) if found else set()
    return [
        ({name: value for name, value in key if (name, value) not in shared}, of) for key, of in found.items()
    ]


def by_seed(rows: Sequence[Row], name: str, family: str, depth: int) -> dict[int, float]:
    """A number of each seed."""
    return {
        int(row.settings["seed"]): float(row.numbers.get(name, math.nan))
        for row in rows
        if row.settings["family"] == family and row.settings["depth"] == depth
    }


@dataclass(frozen=True)
class Networks:
    """What claims are tested on: the rows of a study, at its largest depth and over depth."""

    rows: Sequence[Row]

    @property
    def depth(self) -> int:
        """The largest number of layers."""
        return deepest(self.rows)

    @property
    def first_variant(self) -> Networks:
        """Those of the variant that came first, which a study is of."""
        return Networks(by_variant(self.rows)[0][1]) if self.rows else self

    def at_depth(self, family: str) -> list[Row]:
        """The deepest networks of a family."""
        settings = {"family": family, "depth": self.depth}
        return [row for row in self.rows if settings.items() <= row.settings.items()]

    def numbers(self, name: str, family: str) -> list[float]:
        """A number of the deepest networks, for each seed."""
        return list(by_seed(self.rows, name, family, self.depth).values())

    def paired(
        self,
        one: tuple[str, str],
        other: tuple[str, str],
        combine: Callable[[float, float], float] = operator.sub,
    ) -> list[float]:
        """Two numbers of each seed combined: seeds share their data and, where families allow it, their weights.

        ``one, other``: name and family.
        """
        first, second = (by_seed(self.rows, *each, self.depth) for each in (one, other))
        return [combine(first[seed], second[seed]) for seed in first if seed in second]

    def between(self, name: str, one: str, other: str) -> list[float]:
        """The number of one family less that of another, for each seed."""
        return self.paired((name, one), (name, other))


def exponents(rows: Sequence[Row], name: str, family: str) -> list[float]:
    """For each seed, the power of the depth with which a positive number grows: a straight line in logarithms.

    Returns: NaN where a seed has fewer than two depths, or a number that is not positive.
    """
    points: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        if row.settings["family"] == family:
            point = int(row.settings["depth"]), float(row.numbers.get(name, math.nan))
            points.setdefault(int(row.settings["seed"]), []).append(point)
    return [_slope(each) for each in points.values()]


def _slope(points: Sequence[tuple[int, float]]) -> float:
    depths, values = map(np.array, zip(*points, strict=True))
    if len(set(depths)) < 2 or not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])
