"""What do the mixing matrices claim to be? The constraints that they were measured to satisfy, or are meant to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DOUBLY = ("doubly stochastic",)
# What a constraint begins with where the matrices are doubly stochastic, or meant to be by what they satisfy: non-negative
# with one exact sum, as a Sinkhorn that was stopped early or that normalises one axis only leaves them.
ONE_EXACT_SUM = (*DOUBLY, "row-stochastic only", "column-stochastic only")
BOTH_SUMS = (*DOUBLY, "rows and columns sum to 1")
ONE_SUM = ("rows sum to 1", "columns sum to 1")


def satisfies(attrs: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether the matrices were measured to satisfy one of some constraints, or are of the family that does."""
    return attrs.get("family") == "mhc" or str(attrs.get("constraint", "")).startswith(names)
