"""What do healthy trained networks look like? The table that ``python -m tests.verdicts.references`` measured."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

DEFAULT = "depthscope's default"
"""The source of a limit that no publication states."""

# The declared source of limits that are set by hand and lie beyond what 99 % of these networks have; `source_of` gives their
# number.
NOT_CONTRADICTED = "set by hand, not contradicted by healthy networks"
FEWEST = 50  # networks: of fewer, 99 % means nothing
ENOUGH_TO_TELL = 20  # networks among which a number is told to be rare
SHARE = 0.99
# By which factor a limit lies beyond what 99 % of the networks have.
MARGIN = 1.25


@cache
def healthy_networks() -> tuple[Mapping[str, str], ...]:
    """The rows of the trained networks: facts about each, and its worst number of every verdict."""
    source = files("depthscope.diagnostics").joinpath("verdicts", "healthy_networks.csv")
    rows = csv.DictReader(source.read_text(encoding="utf-8").splitlines())
    return tuple(row for row in rows if int(row["steps"]))


@cache
def healthy_values(verdict: str, *, without: str = "") -> tuple[float, ...]:
    """The numbers of a verdict in these networks, the smallest first.

    ``without``: a kind whose networks are left out.
    """
    rows = (row for row in healthy_networks() if row["kind"] != without)
    return tuple(sorted(float(row[verdict]) for row in rows if row.get(verdict)))


def limit_with_margin(values: tuple[float, ...], *, above: bool) -> float:
    """The number that is by the margin beyond what 99 % of some values are; NaN of too few values.

    Examples
    --------
    >>> limit_with_margin(tuple(range(1, 101)), above=True)
    123.75
    """
    if len(values) < FEWEST:
        return math.nan
    # An actual network's number and no interpolation: the worst few are what matters.
    place = math.ceil(SHARE * len(values)) - 1
    reached = values[place] if above else values[-1 - place]
    return reached * MARGIN if above == (reached > 0) else reached / MARGIN


def source_of(verdict: str, *, mildest: float, above: bool) -> str:
    """The source of the limits of a verdict that cites the healthy networks.

    Returns: Such as ``"set by hand, not contradicted by 212 healthy networks of 53 kinds"``; ``"depthscope's default"``
    where the limit is not by the margin beyond what 99 % of them have, or there were too few.
    """
    limit = limit_with_margin(healthy_values(verdict), above=above)
    if not (mildest >= limit if above else mildest <= limit):
        return DEFAULT
    kinds = {row["kind"] for row in healthy_networks() if row.get(verdict)}
    return f"set by hand, not contradicted by {len(healthy_values(verdict))} healthy networks of {len(kinds)} kinds"


def as_far(verdict: str, value: float, *, above: bool) -> str:
    """How many healthy networks have such a number, as a sentence; empty where too few were measured."""
    values = healthy_values(verdict)
    if len(values) < ENOUGH_TO_TELL or math.isnan(value):
        return ""
    count = sum(each >= value if above else each <= value for each in values)
    return f" {count or 'None'} of {len(values)} healthy networks look{'s' * (count == 1)} like this."
