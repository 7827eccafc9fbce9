"""How does a word of another alphabet enter a LaTeX document? As a picture one line high, whose letters can be copied."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from depthscope.app.drawing.matplotlib.fonts import FONTS, set_fonts
from depthscope.app.drawing.matplotlib.style import Width, figure_style, plain

_POINTS = 10.0
HIGH, BELOW = 1.2, 0.25
"""Height of the picture, and what of it is below the line, in units of the type size."""


def write_word(text: str, path: Path) -> None:
    """Write a word as a PDF that is one line high.

    ``text``: what no installed font has is written as Python escapes it.
    """
    # The margin of the figures' settings is for two widths; the font is one that has many alphabets.
    with (
        figure_style(Width(1.0, _POINTS)),
        mpl.rc_context({"font.family": [*reversed(FONTS)], "font.size": 0.85 * _POINTS}),
    ):
        # At many dots an inch its width is that of the outlines, not of whole dots.
        canvas = Canvas(figsize=(1.0, HIGH * _POINTS / 72), dpi=1200)
        word = canvas.text(0.0, BELOW / HIGH, plain(text, longest=None), va="baseline", ha="left")
        set_fonts(word)
        wide = word.get_window_extent().width / canvas.dpi
        canvas.set_size_inches(max(wide, 0.02) + 0.01, HIGH * _POINTS / 72)
        canvas.savefig(path, metadata={"CreationDate": None})
