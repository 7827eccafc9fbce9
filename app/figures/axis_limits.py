"""Where does an axis begin and end? At the measured values, with room for theory and without magnified rounding."""

from __future__ import annotations

from depthscope.app.figures.specification import Array

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


def limits_with_theory(measured: Array, theory: Array, log_y: bool) -> tuple[float, float]:
    """Ends of an axis: the measured values, and theory as far as a decade (half the measured span) beyond.

    A law may be off by many orders of magnitude; it must not flatten the curves that it is compared with.

    ``measured, theory``: values that the axis can show; at least one measured.

    Examples
    --------
    >>> import numpy as np
    >>> limits_with_theory(np.array([1.0, 2.0]), np.array([1.0, 1e9]), True)
    (1.0, 20.0)
    """
    low, high = float(measured.min()), float(measured.max())
    # A heuristic of ours, as is the decade of a logarithmic axis.
    room = 0.5 * (high - low)
    least, most = (low / 10, high * 10) if log_y else (low - room, high + room)
    return (
        # `initial`: without a point of theory the limits are those of the measured values.
        max(float(theory.min(initial=low)), least),
        min(float(theory.max(initial=high)), most),
    )
