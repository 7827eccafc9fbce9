"""How are frames appended to a log? By one call of the system: a writer that is killed leaves complete frames and a torn one.

The torn one is ignored by those who read, and overwritten by the next writer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.errors import AbsentError, InputError
from depthscope.diagnostics.schema.live_store_files import LOG
from depthscope.diagnostics.schema.live_store_frames import frames_from, packed

SYNC_SECONDS = 10.0
"""The log is flushed to the disk at most this often: a killed process loses nothing, a power cut the rows of these seconds."""

Frames = Sequence[tuple[int, bytes]]
"""Kinds and payloads."""


class RowLog:
    """The log of a store that this process writes; `start` or `open` comes first."""

    def __init__(self, store: Path) -> None:
        self._store, self._path = store, store / LOG
        self._descriptor: int | None = None
        # Its bytes and the checksum of its last frame: one attribute, since an interrupt may come between two.
        self._tail = (0, 0)
        self._synced = 0.0

    @property
    def size(self) -> int:
        """Bytes of complete frames."""
        return self._tail[0]

    def start(self, frames: Frames) -> None:
        """A new log of some frames takes the place of the one that is there."""
        content, checksum = _packed(frames, 0)
        with replaced_file(self._path) as fresh:
            fresh.write_bytes(content)
        self.open(len(content), checksum)

    def open(self, size: int, checksum: int) -> None:
        """Append to the log from a size on; what is after it was torn."""
        flags = os.O_RDWR | os.O_APPEND
        for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, name, 0)
        former, self._descriptor = self._descriptor, os.open(self._path, flags)
        if former is not None:
            os.close(former)
        os.ftruncate(self._descriptor, size)
        self._tail, self._synced = (size, checksum), time.monotonic()

    def require_present(self) -> tuple[int, int]:
        """The log's descriptor and size; FileNotFoundError where the log at its path is another one or none."""
        if self._descriptor is None:
            raise InputError(f"{self._store} is closed")
        mine = os.fstat(self._descriptor)
        try:
            here = os.path.samestat(os.stat(self._path), mine)
        except OSError:
            here = False
        if not here:
            raise AbsentError(f"{self._store} has gone, or another one is in its place")
        return self._descriptor, mine.st_size

    def write(self, frames: Frames, *, sync: bool = False) -> None:
        """Append frames, all or none; OSError where they were not written, as on a full disk."""
        descriptor, size = self.require_present()
        if size != self.size:
            # What an interrupt kept from being counted, or a full disk from being undone: complete frames count.
            for frame in frames_from(self._path.read_bytes()):
                self._tail = (frame.end, frame.checksum)
            os.ftruncate(descriptor, self.size)
        content, checksum = _packed(frames, self._tail[1])
        left = memoryview(content)
        try:
            while left:  # once, but where the disk is almost full
                left = left[os.write(descriptor, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self.size)
            raise
        self._tail = (self.size + len(content), checksum)
        if sync or time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(descriptor)
            self._synced = time.monotonic()

    def close(self) -> None:
        """End writing; calling it twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _packed(frames: Frames, before: int) -> tuple[bytes, int]:
    parts = []
    for kind, payload in frames:
        part, before = packed(kind, payload, before)
        parts.append(part)
    return b"".join(parts), before
