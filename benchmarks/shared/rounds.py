"""How long does a tool take, relative to another in the same rounds? The ratio of medians, with quartiles."""

from __future__ import annotations

import statistics
from typing import Any


def ratio(values: list[float], base: list[float]) -> dict[str, Any]:
    """Seconds of a tool in each round relative to a baseline's: ratio of medians, its quartiles, and the difference."""
    # Medians: one round in which the machine was busy does not count.
    middle = statistics.median(base)
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {
        "ratio": statistics.median(values) / middle,
        "quartiles": [quarters[0] / middle, quarters[2] / middle],
        "rounds": len(values),
        "seconds": statistics.median(values),
        "extra_seconds": statistics.median(values) - middle,
    }
