"""What does everything that depthscope refuses have in common? One base, next to Python's own class for the same mistake."""

from __future__ import annotations


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
