"""How much memory does a step need? The kernel's high-water mark of resident memory (Linux and glibc)."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def trimmed() -> float:
    """Return freed memory to the system, reset the peak, and give what is resident, in MiB."""
    # glibc retains freed memory for later allocations: it would hide a step's own.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    return status("VmRSS")


def forget_peak() -> None:
    """Reset the kernel's high-water mark (5, in proc(5), is the command for it)."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> float:
    """A number of the process's status, such as ``VmHWM``, in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, field
    return int(found[1]) / 1024
