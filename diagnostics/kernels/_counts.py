"""Counts are whole numbers: of neighbours, rounds, rows, columns."""

import operator
from typing import Any


def whole(value: Any, *, name: str, least: int = 1) -> int:
    """The count as Python's own number, refused where it is not whole or below ``least``."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise ValueError(
            f"{name} is {value!r}; expected a whole number, {least} or more: give an int"
        ) from None
    return count
