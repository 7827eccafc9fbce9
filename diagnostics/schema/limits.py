"""How much may a run on disk ask for? No more than its bytes can account for, so that a small file cannot fill the memory."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from depthscope.diagnostics.atomic_writes import kind_of
from depthscope.diagnostics.schema.validation import SchemaError

# Heuristics of ours, far above the largest run that was tried (96 layers, 900 variables a group) and small enough that
# looking at as many takes less than a few seconds.
MAX_GROUPS, MAX_VARIABLES = 256, 20_000
MAX_FILES = 100_000
MAX_TEXT = 16 << 20
"""Bytes of one metadata file of Zarr."""

# States hardly get smaller by compression; rows of NaN, of what was not measured in most steps, do.
_FREE_BYTES = 256 << 20
_RATIO = 32


@dataclass(frozen=True)
class Limit:
    """Bytes that the arrays of a run may have in memory, and where that number is from."""

    max_bytes: int  # the limit
    reason: str  # for the message: what set it

    @classmethod
    def of(cls, stored: int, max_bytes: int | None) -> Limit:
        """The limit that was asked for, or else what the bytes on disk can account for."""
        if max_bytes is not None:
            return cls(max_bytes, f"the limit of {max_bytes} bytes that was asked for")
        allowed = _FREE_BYTES + _RATIO * stored
        return cls(
            allowed, f"the {allowed} bytes that {stored} stored bytes can account for; raise it by max_bytes"
        )

    def check(self, declared: int) -> None:
        """Refuse arrays whose shapes and dtypes ask for more bytes than the limit."""
        if declared > self.max_bytes:
            raise SchemaError(f"its arrays need {declared} bytes, more than {self.reason}")


def require_dense(path: Path, entry: os.stat_result) -> None:
    """Refuse a file with far more bytes than the disk holds of it: a hole of a terabyte takes no room there."""
    # Windows does not know. 16 MiB and 32 times: a file system may compress what is in it.
    held = 512 * getattr(entry, "st_blocks", entry.st_size)
    if entry.st_size > (16 << 20) + _RATIO * held:
        raise SchemaError(f"{path} has {entry.st_size} bytes, of which the disk holds {held}; copy it again")


def require_ordinary(path: Path, *, folder: bool) -> None:
    """Refuse what is no ordinary file (or folder): opening a pipe waits for ever, a device has no end; links are followed."""
    mode = os.stat(path).st_mode
    expected = "a folder" if folder else "a file"
    if (folder and stat.S_ISDIR(mode)) or (not folder and stat.S_ISREG(mode)):
        return
    raise SchemaError(f"it is {kind_of(mode)}; expected {expected}")
