"""Which sizes do the shapes of a connection's tensors give? The solutions of a row's shape equations."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from depthscope.probes.static.formula import Formula, FormulaError

Sizes = dict[str, int]
Shape = tuple[Formula, ...]

# What a symbol may be; those that are not listed (D, r, …) are sizes of features without an upper limit.
RANGES: dict[str, range] = {
    "n": range(2, 65),  # streams
    "m": range(1, 65),  # streams that the branch reads and writes
    "f": range(2, 33),  # fractions
    "v": range(1, 17),  # inputs of the branch
    "k": range(1, 17),  # queries
    "p": range(1, 65),  # proposals
}


def shape_of(text: str) -> tuple[Shape, ...]:
    """The alternatives of a shape such as ``"n*(n+2), n*D"`` or ``"n | 1, n"``.

    ``text``: sizes, separated by commas; alternatives by ``|``.
    """
    return tuple(_alternative(each) for each in text.split("|"))


def _alternative(text: str) -> Shape:
    parts: list[str] = []
    depth = 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if not parts or (sign == "," and depth == 0):
            parts.append("")
        if sign != "," or depth:
            parts[-1] += sign
    return tuple(Formula(part) for part in parts)


def solve(
    shapes: Mapping[str, tuple[int, ...]],
    equations: Mapping[str, Sequence[Shape]],
    conditions: Sequence[Formula],
) -> list[Sizes]:
    """Every assignment of the symbols with which all shapes are as a row gives them.

    ``shapes``: shapes of the tensors that exist, by role.
    """
    found: list[Sizes] = []
    choices = [_of_rank(equations[role], shape) for role, shape in shapes.items()]
    for alternatives in itertools.product(*choices):
        pairs = [pair for each in alternatives for pair in each]
        for sizes in _assignments(pairs, {}):
            if sizes not in found and all(condition.value(sizes) for condition in conditions):
                found.append(sizes)
    return found


def _of_rank(alternatives: Sequence[Shape], shape: tuple[int, ...]) -> list[list[tuple[Formula, int]]]:
    """The alternatives with as many dimensions as a shape, as pairs of formula and size."""
    # One number may be stored as () or as (1,).
    sizes = shape or (1,)
    return [list(zip(each, sizes, strict=True)) for each in alternatives if len(each) == len(sizes)]


def _assignments(pairs: Sequence[tuple[Formula, int]], known: Sizes) -> Iterator[Sizes]:
    """Assignments that satisfy all equations; the equation with the fewest unknown symbols is solved first."""
    if not pairs:
        yield known
        return
    formula, size = min(pairs, key=lambda pair: len(pair[0].names - known.keys()))
    unknown = sorted(formula.names - known.keys(), key=lambda name: len(RANGES.get(name, range(sys.maxsize))))
    if not unknown:
        if formula.value(known) == size:
            rest = [pair for pair in pairs if pair != (formula, size)]
            yield from _assignments(rest, known)
        return
    name = unknown[0]
    for value in _candidates(formula, name, size, known, alone=len(unknown) == 1):
        yield from _assignments(pairs, {**known, name: value})


def _candidates(formula: Formula, name: str, size: int, known: Sizes, *, alone: bool) -> Iterable[int]:
    """Values of a symbol that an equation allows; where it is the only unknown, those that solve it."""
    if name in RANGES:
        # A symbol is at most the size that it is part of.
        return (value for value in RANGES[name] if value <= size)
    if not alone:
        raise FormulaError(
            f"the size {formula.text!r} has several unknown factors; give each a shape of its own"
        )
    # Sizes of features are large, and their equations linear: two values give the line.
    at_zero, at_one = (float(formula.value({**known, name: value})) for value in (0, 1))
    slope = at_one - at_zero
    solution = (size - at_zero) / slope if slope else 0.0
    return [round(solution)] if solution >= 1 and solution == round(solution) else []
