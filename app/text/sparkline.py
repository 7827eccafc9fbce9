"""What did a verdict see along the axis? The numbers that it judged, as a small curve against their limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from depthscope.app.text.numbers import number
from depthscope.diagnostics import Finding
from depthscope.diagnostics.numbers import number as short_number

if TYPE_CHECKING:  # an extra: the terminal's curve needs none
    from markupsafe import Markup

BLOCKS = "▁▂▃▄▅▆▇█"
UNDEFINED_BLOCK = "·"

MOST_BLOCKS, MOST_POINTS = 28, 240
"""Of a curve in a terminal, and of one of SVG. Longer ones keep the worst number of each part."""

WIDTH, HEIGHT, MARGIN = 240, 40, 3
"""Of the SVG, in its own units."""

ROUNDING = 1e-12
"""Of a number near 1, in float64 after some sums."""

DECADES = 1.5
"""From so many powers of ten on the curve is drawn over logarithms: a gain of 1000 would hide all others."""


def curve_words(finding: Finding) -> str:
    """What the curve shows, for those who do not see it; empty where the verdict judged a single number.

    Returns: Such as ``depth 0–30: 0.02 to 0.98, worse below 0.3; 2 undefined``.
    """
    curve = _curve(finding)
    if curve is None:
        return ""
    missing = len(curve.values) - len(curve.known)
    side = "above" if curve.above else "below"
    low, high = (number(float(end)) for end in (curve.known.min(), curve.known.max()))
    reach = f"{low} throughout" if curve.is_flat else f"{curve.of}{low} to {high}"
    words = f"{finding.axis} 0–{len(curve.values) - 1}: {reach}, worse {side} {short_number(curve.limit)}"
    return f"{words}; {missing} undefined" if missing else words


def curve_blocks(finding: Finding) -> str:
    """The curve as block characters, low to high; a dot where it is undefined.

    Returns: At most `MOST_BLOCKS` characters; empty where the verdict judged a single number, or one that is repeated.
    """
    curve = _curve(finding)
    if curve is None or curve.is_flat:
        return ""
    heights = _heights(_worst_of_parts(curve.values, MOST_BLOCKS, curve.above), curve.limit)[0]
    return "".join(
        UNDEFINED_BLOCK if math.isnan(height) else BLOCKS[min(int(height * len(BLOCKS)), len(BLOCKS) - 1)]
        for height in heights
    )


def curve_svg(finding: Finding) -> Markup:
    """The curve as SVG: the worse side of the limit is shaded, the place of the finding is underlined, gaps are undefined.

    Returns: Without references to anything outside; empty where the verdict judged a single number.
    """
    from markupsafe import Markup

    curve = _curve(finding)
    if curve is None:
        return Markup()
    drawn = _worst_of_parts(curve.values, MOST_POINTS, curve.above)
    heights, level = _heights(drawn, curve.limit)
    # Half a position on both sides: a finding at one position has a width too.
    last, half = len(curve.values) - 1, 0.4
    scale = (WIDTH - 2 * MARGIN) / last
    ends = (finding.first - half, finding.last + half)
    start, end = (MARGIN + scale * min(max(at, 0), last) for at in ends)
    underline = f'x1="{start:.1f}" x2="{end:.1f}" y1="{HEIGHT - 1}" y2="{HEIGHT - 1}"'
    path = _path(np.linspace(MARGIN, WIDTH - MARGIN, len(drawn)), _down(heights))
    shapes = f'<line class="place" {underline}/>{path}'
    if level is not None:
        edge = float(_down(np.array([level]))[0])
        top, bottom = (0.0, edge) if curve.above else (edge, float(HEIGHT))
        shapes = (
            f'<rect class="worse" x="0" y="{top:.1f}" width="{WIDTH}" height="{bottom - top:.1f}"/>'
            f'<line class="limit" x1="0" x2="{WIDTH}" y1="{edge:.1f}" y2="{edge:.1f}"/>{shapes}'
        )
    return Markup(
        '<svg class="curve {}" xmlns="http://www.w3.org/2000/svg" role="img" '
        'aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>'
    ).format(
        finding.severity.name.lower(), curve_words(finding), WIDTH, HEIGHT, WIDTH, HEIGHT, Markup(shapes)
    )


@dataclass(frozen=True)
class _Curve:
    """What is drawn: the numbers that were judged, or how far they are from 1."""

    values: np.ndarray
    limit: float
    above: bool
    of: str = ""

    @property
    def known(self) -> np.ndarray:
        """The numbers that are defined."""
        return self.values[np.isfinite(self.values)]

    @property
    def is_flat(self) -> bool:
        """Whether all numbers read the same."""
        return len({number(float(value)) for value in self.known}) == 1


def _curve(finding: Finding) -> _Curve | None:
    """The curve of a finding; None where there are not two numbers that are known."""
    plain = _Curve(np.asarray(finding.profile, dtype=np.float64), finding.threshold, finding.above)
    if len(plain.known) < 2:
        return None
    # Cosines and similarities may all read 1.00: what differs is their distance from 1, unless that is rounding.
    distance = _Curve(1.0 - plain.values, 1.0 - plain.limit, not plain.above, "1 − x from ")
    near = plain.is_flat and number(float(plain.known[0])) == number(1.0)
    differs = near and not distance.is_flat and np.abs(distance.known).max() > ROUNDING
    return distance if differs else plain


def _worst_of_parts(values: np.ndarray, most: int, above: bool) -> np.ndarray:
    """At most so many numbers: of each part the worst, so that a single peak is not lost."""
    if len(values) <= most:
        return values
    parts = np.array_split(np.where(np.isfinite(values), values, np.nan), most)
    worst = np.nanmax if above else np.nanmin
    return np.array([worst(part) if np.isfinite(part).any() else np.nan for part in parts])


def _heights(values: np.ndarray, limit: float) -> tuple[np.ndarray, float | None]:
    """Heights from 0 to 1 of the numbers and of the limit; None for a limit that would flatten the curve."""
    shown, level = np.where(np.isfinite(values), values, np.nan), float(limit)
    positive = shown[shown > 0]
    # A zero among positive numbers has no logarithm: the scale stays linear.
    is_positive = positive.size > 0 and positive.size == np.isfinite(shown).sum()
    if is_positive and positive.max() > 10**DECADES * positive.min():
        shown = np.log10(shown)
        level = math.log10(level) if level > 0 else math.nan
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    reach = max(high - low, abs(high) * 1e-9, 1e-300)
    # A limit far from all numbers would leave a straight line of the curve: then it is not drawn, only named.
    # A constant has no curve that could be flattened.
    near = math.isfinite(level) and (low == high or low - 2 * reach <= level <= high + 2 * reach)
    if near:
        low, high = min(low, level), max(high, level)
    reach = max(high - low, abs(high) * 1e-9, 1e-300)
    return (shown - low) / reach, (level - low) / reach if near else None


def _down(heights: np.ndarray) -> np.ndarray:
    """Heights as SVG counts them: from the top, with room for the underline."""
    return MARGIN + (HEIGHT - 2 * MARGIN - 2) * (1.0 - heights)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line for every stretch of known numbers, and a dot for a single one."""
    known = np.isfinite(y)
    shapes: list[str] = []
    stretches = np.split(np.arange(len(y)), np.flatnonzero(np.diff(known.astype(int))) + 1)
    for stretch in stretches:
        if not known[stretch[0]]:
            continue
        if len(stretch) == 1:
            shapes.append(f'<circle class="dot" cx="{x[stretch[0]]:.1f}" cy="{y[stretch[0]]:.1f}" r="1.8"/>')
        else:
            points = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in stretch)
            shapes.append(f'<polyline class="line" points="{points}"/>')
    return "".join(shapes)
