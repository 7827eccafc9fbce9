"""What does everything that is refused have in common? One base class, and the closest names to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DepthscopeError(Exception):
    """Every error that depthscope raises itself."""


class InputError(DepthscopeError, ValueError):
    """What came is not what was expected; the message has both, and what to do."""


class MissingExtraError(DepthscopeError, ModuleNotFoundError):
    """A package that is not installed, of an extra that the message names."""


class StorageError(DepthscopeError, OSError):
    """Something cannot be read from a place, or written there."""


class TakenError(StorageError, FileExistsError):
    """What is at a place must stay."""


class AbsentError(StorageError, FileNotFoundError):
    """Nothing is at a place."""


class ProtectedError(StorageError, PermissionError):
    """A place may not be written to."""


class BusyError(StorageError, BlockingIOError):
    """Another process is writing there."""


class SlowError(StorageError, TimeoutError):
    """Another process did not end in time."""


class NoFolderError(StorageError, NotADirectoryError):
    """A file is where a folder was expected."""


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
