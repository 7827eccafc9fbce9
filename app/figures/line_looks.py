"""Which look has each line of a figure? That of its run among all that are shown; lines of one run alone differ in colour."""

from __future__ import annotations

from itertools import count

from depthscope.app.figures.palette import Look, look_of
from depthscope.app.figures.specification import Lines


def looks_of(figure: Lines) -> dict[int, Look]:
    """How every measured line of a figure is drawn."""
    measured = [line for line in figure.lines if line.role == "measured"]
    # With runs that this figure lacks: the others keep their colours. A mean over seeds has a name of its own.
    numbers = dict(figure.runs)
    for line in measured:
        if line.group not in numbers:
            numbers[line.group] = next(number for number in count() if number not in numbers.values())
    if len(numbers) < 2:
        first = next(iter(numbers.values()), 0)
        return {id(line): look_of(first + place) for place, line in enumerate(measured)}
    num_drawn = dict.fromkeys(numbers, 0)
    looks = {}
    for line in measured:
        looks[id(line)] = look_of(numbers[line.group], num_drawn[line.group])
        num_drawn[line.group] += 1
    return looks


FLAT = 1e-4
"""Values that differ by a smaller share than this count as one value: an axis fitted to them would magnify rounding
into a trend. A heuristic of ours."""


def visible_limits(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, 5 % beyond the values where these are `FLAT`.

    Examples
    --------
    >>> visible_limits(1.0, 2.0), visible_limits(2.0, 2.0)
    ((1.0, 2.0), (1.9, 2.1))
    """
    # Relative to the size of the values, as rounding is: a difference of 1e-3 is a trend at 1 and noise at 1e5.
    size = max(abs(low), abs(high))
    if high - low >= FLAT * size:
        return low, high
    return low - 0.05 * size, high + 0.05 * size
