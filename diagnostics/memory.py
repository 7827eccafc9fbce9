"""Memory that was freed, and the system."""

import ctypes
import sys

MOST_HEAPS = -8  # M_ARENA_MAX of glibc's malloc.h


def give_memory_back() -> None:
    """Return freed memory to the system: glibc keeps it, in pieces that larger arrays do not fit into."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def share_heaps() -> None:
    """Let the threads to come share two heaps: glibc makes eight for each core, and each keeps what is freed in it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MOST_HEAPS, 2)
