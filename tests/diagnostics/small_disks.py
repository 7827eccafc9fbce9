"""A file system in memory with so many bytes, for tests of what happens when it is full."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A folder with so much room; the test is skipped where nothing can be mounted."""
    if sys.platform != "linux":
        pytest.skip("a file system of Linux is mounted")
    libc, place = ctypes.CDLL(None, use_errno=True), str(folder).encode()
    if libc.mount(b"tmpfs", place, b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        libc.umount2(place, 2)  # lazily: a killed child may not have ended yet
