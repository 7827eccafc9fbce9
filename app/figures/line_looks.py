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
