"""Which letters can a figure draw? Those of the fonts that come with matplotlib; all others are escaped."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

from matplotlib import font_manager, ft2font
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

FONTS = ("STIXGeneral", "DejaVu Sans")
"""Fonts of figures; the second one has the signs that the first one lacks."""

# Matplotlib 3.11 orders letters from right to left and joins them, by libraqm; before it, they would stand the wrong way
# round or apart.
_SHAPES = hasattr(ft2font, "__libraqm_version__")


@functools.lru_cache(maxsize=4096)
def can_draw(letter: str) -> bool:
    """Whether a letter can be drawn, as it is written and not as an empty box.

    Returns: False for joiners, which nobody would read, and for letters that this matplotlib cannot order or join.
    """
    if letter.isspace():
        return True
    if unicodedata.category(letter) in ("Cf", "Mc") or "\ufe00" <= letter <= "\ufe0f":
        return False
    if not _SHAPES and unicodedata.bidirectional(letter) in ("R", "AL", "AN"):
        return False
    return any(_has(family, letter) for family in FONTS)


def points_across(text: str, points: float) -> float:
    """How wide a text is; of several lines the widest."""
    properties = FontProperties(family=list(FONTS), size=points)
    lines = ["".join(filter(can_draw, line)) for line in text.splitlines()]
    widths = (text_to_path.get_text_width_height_descent(line, properties, False)[0] for line in lines)
    return float(max(widths, default=0.0))


def _has(family: str, letter: str) -> bool:
    """Whether a family has an outline of a letter."""
    font: Any = font_manager.get_font(font_manager.findfont(FontProperties(family=[family])))
    if not font.get_char_index(ord(letter)):
        return False
    font.load_char(ord(letter))
    return len(font.get_path()[0]) > 0
