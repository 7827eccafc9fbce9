"""How many cases of a long test? A sample in a normal run; all of them where ``DEPTHSCOPE_TESTS=every`` asks for hours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def sample_or_every(sample: T, every: T) -> T:
    """What a normal run tries, or everything where it is asked for."""
    return every if os.environ.get("DEPTHSCOPE_TESTS") == "every" else sample


def number_of_draw() -> int:
    """Another draw for every commit, and the same one for the same commit: set ``DEPTHSCOPE_DRAW`` to repeat one."""
    if "DEPTHSCOPE_DRAW" in os.environ:
        return int(os.environ["DEPTHSCOPE_DRAW"])
    words = ["git", "rev-parse", "HEAD"]
    asked = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    # Without a repository, as in an unpacked archive, one fixed draw is better than none.
    return int(asked.stdout[:7], 16) if asked.returncode == 0 else 0
