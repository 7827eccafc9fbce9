"""Where does an axis begin and end? At the measured values, without magnified rounding."""

from __future__ import annotations

FLAT = 1e-4
"""Values that differ by a smaller share than this count as one value: an axis fitted to them would magnify rounding
into a trend. A heuristic of ours."""


def visible_limits(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, 5 % beyond the values where these are `FLAT`.

    Examples
    --------
    >>> visible_limits(1.0, 2.0), visible_limits(2.0, 2.0)
    ((1.0, 2.0), (1.9, 2.1))
    """
    # Relative to the size of the values, as rounding is: a difference of 1e-3 is a trend at 1 and noise at 1e5.
    size = max(abs(low), abs(high))
    if high - low >= FLAT * size:
        return low, high
    return low - 0.05 * size, high + 0.05 * size
