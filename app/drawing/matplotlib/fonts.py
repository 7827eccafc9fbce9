"""Which font draws a letter? One of the figure's own, else an installed one that has it, else none: it is escaped."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager, ft2font
from matplotlib.artist import Artist
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

FONTS = ("STIXGeneral", "DejaVu Sans")
"""Fonts of figures, which come with matplotlib; the second one has the signs that the first one lacks."""

# Matplotlib 3.11 orders letters from right to left and joins them, by libraqm; before it, they would stand the wrong way
# round or apart.
_SHAPES = hasattr(ft2font, "__libraqm_version__")
# Of other containers matplotlib embeds no TrueType outlines, which venues ask for.
_TRUETYPE = (b"\x00\x01\x00\x00", b"true")


def can_draw(letter: str) -> bool:
    """Whether a letter can be drawn, as it is written and not as an empty box.

    Returns: False for letters that no installed font has an outline of, such as joiners, and for those of alphabets
    that this matplotlib cannot order or join.
    """
    return _family_of(letter) is not None


def further_fonts(texts: Iterable[str]) -> list[str]:
    """The installed fonts that draw what `FONTS` lack."""
    letters = sorted({letter for text in texts for letter in text if not letter.isascii()})
    return sorted({family for family in map(_family_of, letters) if family is not None} - set(FONTS))


def set_fonts(root: Artist) -> None:
    """Give the texts of a figure further fonts, where letters in them need some."""
    for text in root.findobj(Text):
        assert isinstance(text, Text)
        letters = set(text.get_text())
        if all(letter.isascii() for letter in letters):
            continue
        own = text.get_fontfamily()
        own = [own] if isinstance(own, str) else list(own)
        lacking = [letter for letter in sorted(letters) if not any(_has(family, letter) for family in own)]
        more = dict.fromkeys(family for family in map(_family_of, lacking) if family is not None)
        if more:
            text.set_fontfamily([*own, *more])


def points_across(text: str, points: float, families: Iterable[str] = FONTS) -> float:
    """How wide a text is.

    ``families``: fonts; letters that they lack are measured in those that draw them.
    """
    lacking = (_family_of(letter) for letter in sorted(set(text)) if not letter.isascii())
    known = list(dict.fromkeys([*families, *filter(None, lacking)]))
    properties = FontProperties(family=known, size=points)
    # Of several lines the widest.
    drawn = {letter for letter in text if letter.isprintable() and (letter.isascii() or can_draw(letter))}
    lines = ["".join(letter for letter in line if letter in drawn) for line in text.splitlines()]
    widths = (text_to_path.get_text_width_height_descent(line, properties, False)[0] for line in lines)
    return float(max(widths, default=0.0))


@functools.lru_cache(maxsize=4096)
def _family_of(letter: str) -> str | None:
    """The family that draws a letter: of `FONTS`, else the first of the installed ones."""
    if letter.isspace():
        return FONTS[0]
    # Some fonts draw joiners, which nobody would read.
    if unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f":
        return None
    if not _SHAPES and _is_shaped(letter):
        return None
    return next((family for family in (*FONTS, *_installed()) if _has(family, letter)), None)


def _is_shaped(letter: str) -> bool:
    """Whether the form or the place of a letter depends on its neighbours."""
    return (
        unicodedata.bidirectional(letter) in ("R", "AL", "AN")
        or unicodedata.category(letter) == "Mc"
        # The scripts of India and of Southeast Asia.
        or "\u0900" <= letter <= "\u109f"
        or "\u1780" <= letter <= "\u17ff"
    )


@functools.cache
def _installed() -> dict[str, str]:
    """The upright TrueType fonts of this machine, family to file; those of one width last."""
    found: dict[str, str] = {}
    for entry in sorted(
        font_manager.fontManager.ttflist, key=lambda entry: ("Mono" in entry.name, entry.fname)
    ):
        upright = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        # Those of matplotlib are `FONTS`; its others have signs at places that Unicode gives to other ones, or boxes.
        own = Path(entry.fname).is_relative_to(mpl.get_data_path())
        if upright and entry.stretch == "normal" and not own and _is_truetype(entry.fname):
            found.setdefault(entry.name, entry.fname)
    return found


def _is_truetype(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in _TRUETYPE
    except OSError:  # removed since matplotlib listed the fonts
        return False


@functools.cache
def _path(family: str) -> str:
    """The file that matplotlib draws a family with; empty for none."""
    try:
        return str(font_manager.findfont(FontProperties(family=[family]), fallback_to_default=False))
    except ValueError:  # not installed
        return ""


@functools.lru_cache(maxsize=16384)
def _has(family: str, letter: str) -> bool:
    """Whether a family has an outline of a letter."""
    path = _installed().get(family) or _path(family)
    if not path:
        return False
    font: Any = font_manager.get_font(path)
    glyph = font.get_char_index(ord(letter))
    # A font of last resort has one box for all letters of a block.
    if not glyph or glyph == font.get_char_index(ord(letter) + 1):
        return False
    if letter.isspace():
        return True
    # Joiners and colour pictures have a place in a font and no outline.
    font.load_char(ord(letter))
    return len(font.get_path()[0]) > 0
