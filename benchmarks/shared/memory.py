"""How much memory does a step need? The kernel's high-water mark of resident memory (Linux and glibc)."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def trimmed() -> float:
    """Give freed memory back, forget the peak so far, and tell what is resident, in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    return status("VmRSS")


def forget_peak() -> None:
    """Start the kernel's high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> float:
    """A number of the process's status, such as ``VmHWM``, in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, field
    return int(found[1]) / 1024
