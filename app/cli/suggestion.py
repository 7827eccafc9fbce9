"""What was probably meant by a name that does not exist? The closest one that does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message that names what was probably meant.

    Parameters
    ----------
    name : str
        What came.
    known : iterable of str
        What was expected.

    Returns
    -------
    str
        Such as ``; closest: 'check'``, or all names where none is near.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; closest: {near[0]!r}" if near else f"; expected one of {', '.join(names)}"
