"""What does a tool take, against another in the same rounds? The ratio of medians, with quartiles."""

from __future__ import annotations

import statistics
from typing import Any


def ratio(values: list[float], base: list[float]) -> dict[str, Any]:
    """Seconds of a tool beside those of what it is compared with.

    Parameters
    ----------
    values : list of float
        Seconds of each round.
    base : list of float
        Those of the other.

    Returns
    -------
    dict
        ``ratio`` of medians, its ``quartiles``, ``rounds``, ``seconds`` and ``extra_seconds``.
    """
    middle = statistics.median(base)
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {
        "ratio": statistics.median(values) / middle,
        "quartiles": [quarters[0] / middle, quarters[2] / middle],
        "rounds": len(values),
        "seconds": statistics.median(values),
        "extra_seconds": statistics.median(values) - middle,
    }
