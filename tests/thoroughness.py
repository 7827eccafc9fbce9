"""How many cases of a long test? A sample in a normal run; all of them where ``DEPTHSCOPE_TESTS=every`` asks for hours."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def sample_or_every(sample: T, every: T) -> T:
    """What a normal run tries, or everything where it is asked for."""
    return every if os.environ.get("DEPTHSCOPE_TESTS") == "every" else sample
