"""Which existing name was probably meant? The advice that error messages about unknown names end with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# difflib's similarity, from 0 to 1, below which a name is not suggested (a heuristic of ours): its own default of 0.6 misses
# abbreviations, and names that have nothing to do with each other reach 0.36 ("chek" and "compare").
CUTOFF = 0.4
MAX_NAMES = 3


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Advice for an error message about an unknown name.

    ``otherwise``: the advice where no name is similar; all names by default.

    Examples
    --------
    >>> did_you_mean("chek", ["check", "compare"])
    "closest: 'check'"
    >>> did_you_mean("xyz", ["check", "compare"])
    'expected one of check, compare'
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=MAX_NAMES, cutoff=CUTOFF)
    if near:
        return f"closest: {', '.join(map(repr, near))}"
    return otherwise or f"expected one of {', '.join(names)}"
