"""How a number is printed: with its uncertainty and its null, and with a dash where it is undefined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from depthscope.app.text.visible import LONGEST_TEXT, visible
from depthscope.diagnostics.schema import UNPROVEN

UNDEFINED = "–"


def number(value: float, *, digits: int = 3) -> str:
    """A number with so many significant digits, in plain notation where that is short.

    ``value``: naN prints as a dash, since it means undefined.
    """
    if math.isnan(value):
        return UNDEFINED
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:  # plain notation would be longer than scientific
        return _scientific(value, digits)
    return _signed(f"{value:.{_places(value, digits)}f}")


def _places(value: float, digits: int) -> int:
    """Places after the point that show so many significant digits, of the rounded value: 9.996 is 10.0."""
    exponent = int(f"{abs(value):.{digits - 1}e}".split("e")[1])
    return max(digits - 1 - exponent, 0)


def quantity(value: float, stderr: float = math.nan, null: float = math.nan) -> str:
    """A value with its standard error and the value expected without structure.

    Returns: Such as ``12.34 ± 0.41 (baseline 31.2)``; the error has two digits and sets the value's last place.

    Examples
    --------
    >>> quantity(12.345, 0.4123, 31.24)
    '12.35 ± 0.41 (baseline 31.2)'
    >>> quantity(12.345, 0.4123)
    '12.35 ± 0.41'
    """
    if math.isnan(value):
        return UNDEFINED
    # `not … > 0` also for NaN. An error of exactly 0 has no digit that could set the places.
    text = number(value) if not stderr > 0 else _with_error(value, stderr)
    return text if math.isnan(null) else f"{text} (baseline {number(null)})"


def _with_error(value: float, stderr: float) -> str:
    if (
        not (math.isfinite(stderr) and math.isfinite(value))
        or max(abs(value), stderr) >= 1e5
        or stderr < 1e-5
    ):
        return f"{number(value)} ± {number(stderr, digits=2)}"
    # The error has two significant digits, and the value as many places as the error.
    places = _places(stderr, 2)
    return f"{_signed(f'{value:.{places}f}')} ± {stderr:.{places}f}"


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    # 3.00e-7 is 3e-7: zeros of the format are no measured digits.
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return _signed(f"{mantissa}e{int(exponent)}")


def _signed(text: str) -> str:
    # What rounds to nothing has no sign.
    if text.startswith("-") and not text.strip("-0."):
        return text[1:]
    # The minus sign: a hyphen is narrower than the digits, and is read as one.
    return "−" + text[1:] if text.startswith("-") else text


def sentence(parts: Iterable[str]) -> str:
    """Remarks joined to one sentence; empty ones are left out."""
    joined = "; ".join(part for part in parts if part)
    return f"{joined[0].upper()}{joined[1:]}." if joined else ""


def consecutive(places: Iterable[int]) -> list[list[int]]:
    """Increasing integers, those that follow on each other together.

    Examples
    --------
    >>> consecutive([1, 2, 3, 7])
    [[1, 2, 3], [7]]
    """
    runs: list[list[int]] = []
    for place in map(int, places):
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


Attributes = Mapping[Any, Any]
MOST_NAMED = 6
"""Runs of which a caption has a sentence each. A heuristic of ours: more are longer than the figure."""


def proof_sentence(attrs: Mapping[str, Attributes]) -> str:
    """Which of some runs are unproven, and why; empty where none is.

    ``attrs``: run name → attributes of the run or of its analysis.
    """
    unproven = {
        run: visible(proof.removeprefix(UNPROVEN), longest=LONGEST_TEXT)
        for run, of in attrs.items()
        if (proof := str(of.get("proof", ""))).startswith(UNPROVEN)
    }
    return _sentences(attrs, unproven, alone="Unproven", among="Run {} is unproven")


def constraint_sentence(attrs: Mapping[str, Attributes]) -> str:
    """What the mixing matrices of some runs were measured to satisfy; empty where no run has it."""
    known = {
        run: visible(of["constraint"], longest=LONGEST_TEXT)
        for run, of in attrs.items()
        if of.get("constraint")
    }
    return _sentences(attrs, known, alone="H_res", among="H_res of run {}")


def _sentences(attrs: Mapping[str, Attributes], known: Mapping[str, str], *, alone: str, among: str) -> str:
    """Summarise each run in one sentence; name it only if there are several, and one of many only."""
    if len(known) > MOST_NAMED:
        run, words = next(iter(known.items()))
        others = f"{len(known)} of the {len(attrs)} runs, such as {run}"
        return f"{alone}, {others}: {words}."
    subjects = {run: alone if len(attrs) == 1 else among.replace("{}", run) for run in known}
    return " ".join(f"{subjects[run]}: {words}." for run, words in known.items())
