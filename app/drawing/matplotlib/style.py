"""What does a venue ask of a figure? Width, type size and fonts, text in lines that fit, the same bytes again."""

from __future__ import annotations

import functools
import math
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from depthscope.app.text.latex import VENUES
from depthscope.app.text.visible import LONGEST_LABEL, LONGEST_NAME, escape, shortened, visible
from depthscope.diagnostics.errors import InputError


@dataclass(frozen=True)
class Width:
    """Inches across and type size in points of a place in a paper."""

    inches: float
    points: float


# Of the body's ten or eleven points; ticks and legends are one point smaller, which must not be below 7.
FIGURE_POINTS = 8

WIDTHS: dict[str, Width] = {
    **{name: Width(venue.column, 9 if venue.column > 4 else FIGURE_POINTS) for name, venue in VENUES.items()},
    "full": Width(6.75, FIGURE_POINTS),
}
"""The width of one column of every venue, and of both of ICML."""

FONTS = ("STIXGeneral", "DejaVu Sans")
"""Fonts of figures; the second one has the signs that the first one lacks."""

LETTER = 0.5
"""Width of a letter in parts of the type size: a little more than those of these fonts take on average."""

# A date in the file would change its bytes on every export.
_UNDATED: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


@contextmanager
def figure_style(width: str | Width = "icml") -> Iterator[Width]:
    """Matplotlib's settings for one width, undone on leaving.

    ``width``: a key of `WIDTHS`, or any other width.
    Raises InputError: For a width that is not known.
    """
    if isinstance(width, str) and width not in WIDTHS:
        raise InputError(f"width {width!r} is not known; expected {', '.join(WIDTHS)}")
    size = WIDTHS[width] if isinstance(width, str) else width
    with mpl.rc_context(settings_of(size)):
        yield size


def settings_of(size: Width) -> dict[str, Any]:
    """Matplotlib's settings for a width."""
    small = size.points - 1
    return {
        # Looks like the Times of most venues, and comes with matplotlib: the same on every machine.
        "font.family": list(FONTS),
        "mathtext.fontset": "stix",
        "font.size": size.points,
        "axes.labelsize": size.points,
        "axes.titlesize": size.points,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "legend.fontsize": small,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "legend.borderpad": 0.25,
        "legend.labelspacing": 0.3,
        "legend.columnspacing": 1.2,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,  # "+1e3" over an axis is overlooked
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.2,
        "figure.dpi": 150,
        "savefig.dpi": 400,
        "pdf.fonttype": 42,  # TrueType: venues reject the default, Type 3
        "ps.fonttype": 42,
        "svg.fonttype": "path",  # outlines: a reader may lack the fonts
        "svg.hashsalt": "depthscope",  # the same bytes on a rerun
    }


class PaperFigure(Figure):
    """A figure that is drawn and saved with the settings it was made with.

    Matplotlib reads the kind of embedded fonts, the font of mathematics and others when a figure is saved: a figure that was
    made for a venue and saved later would have Type 3 fonts, which venues reject.

    ``size``: whose settings.
    ``figsize``: inches.
    ``layout``: engine of the layout.
    """

    def __init__(
        self,
        size: Width,
        figsize: tuple[float, float],
        layout: Literal["constrained", "compressed"] = "constrained",
    ) -> None:
        # As they are now: a figure for a page of HTML has some of its own.
        self._settings = {name: mpl.rcParams[name] for name in settings_of(size)}
        super().__init__(figsize=figsize, layout=layout)

    def draw(self, renderer: RendererBase) -> None:
        """Draw with the settings of the figure."""
        with mpl.rc_context(self._settings):
            super().draw(renderer)

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save with the settings of the figure: TrueType fonts and, unless ``metadata`` is given, no date."""
        ending = Path(fname).suffix.removeprefix(".") if isinstance(fname, str | PathLike) else ""
        ending = str(kwargs.get("format") or ending or mpl.rcParams["savefig.format"])
        if ending in _UNDATED:
            kwargs.setdefault("metadata", _UNDATED[ending])
        with mpl.rc_context(self._settings):
            super().savefig(fname, **kwargs)


# --- text


def plain(text: str, *, longest: int = LONGEST_LABEL) -> str:
    r"""Text that matplotlib sets as it is: dollars are no mathematics, and what no installed font has is escaped.

    ``longest``: letters after which the middle is left out.

    Examples
    --------
    >>> plain("$x$"), plain("rank \ue000")
    ('\\$x\\$', 'rank \\ue000')
    """
    # Shortened twice: a text of megabytes is not looked at letter by letter, and escapes make it longer again.
    shown = visible(shortened(text, LONGEST_NAME, counted=False), lines=True).strip("\u2068\u2069")
    if not shown.isascii():
        shown = "".join(letter if can_draw(letter) else escape(letter) for letter in shown)
    shown = shortened(shown, longest, counted=False)  # the tables have long names in full
    # A legend leaves out labels that begin with an underscore: matplotlib's own mark of what is internal.
    return (" " + shown if shown.startswith("_") else shown).replace("$", r"\$")


# Matplotlib 3.11 orders letters from right to left and joins them, by libraqm; before it, they would come the wrong way
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


def _has(family: str, letter: str) -> bool:
    """Whether a family has an outline of a letter."""
    font: Any = font_manager.get_font(font_manager.findfont(FontProperties(family=[family])))
    if not font.get_char_index(ord(letter)):
        return False
    font.load_char(ord(letter))
    return len(font.get_path()[0]) > 0


def num_letters(inches: float, points: float | None = None) -> int:
    """Letters that fit along so many inches; three at least, so that narrow axes have no column of single ones.

    ``points``: type size; that of labels by default.
    """
    size = float(mpl.rcParams["font.size"]) if points is None else points
    return max(3, int(72 * inches / (LETTER * size)))


def wrapped(text: str, inches: float, points: float | None = None) -> str:
    """A label in as many lines as it takes to fit along an axis; a word longer than a line is broken where it ends."""
    return "\n".join(textwrap.wrap(plain(text), num_letters(inches, points)))


def num_columns(entries: Sequence[str], size: Width) -> int:
    """Columns of a legend below the axes, so that the longest entry fits."""
    longest = max(map(len, entries), default=0)
    # The handle with its spaces is as wide as nine letters.
    return max(1, min(len(entries), num_letters(size.inches, size.points - 1) // (longest + 9)))


# --- axes


def label_axes(axes: Axes, x_label: str, y_label: str, inches: tuple[float, float]) -> None:
    """Label both axes, wrapped to the inches of each."""
    axes.set_xlabel(wrapped(x_label, inches[0]))
    axes.set_ylabel(wrapped(y_label, inches[1]))


def inches_of(axes: Axes) -> tuple[float, float]:
    """Width and height of axes, as far as their figure's layout is known."""
    box, canvas = axes.get_window_extent(), axes.get_figure(root=True)
    assert canvas is not None  # axes that were removed from their figure are drawn into by nobody
    return box.width / canvas.dpi, box.height / canvas.dpi


def are_whole(values: np.ndarray) -> bool:
    """Whether positions are integers, so that their axis has no ticks between them."""
    return bool(np.all(np.mod(values, 1) == 0))


def plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Number the ticks of a logarithmic axis plainly where it spans little: 0.9 and 1.2, not 9 × 10⁻¹."""
    if not 0 < low < high:
        return
    # Over more than about one and a half decades, powers of ten are read faster than plain numbers, where there are two.
    powers = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    if high / low > 30 and powers > 1:
        return
    few = high / low < 4  # 1-2-5 ticks would leave one or two
    axis.set_major_locator(MaxNLocator(nbins=5) if few else LogLocator(subs=(1, 2, 5)))
    nearly_equal = few and low >= 1e-3  # then the formatter of linear axes finds as many digits as it takes
    # The formatter of a log axis writes powers of ten, which are hard to read between 1 and 10.
    plain_number = FuncFormatter(lambda value, _: f"{value:.4g}")
    axis.set_major_formatter(ScalarFormatter(useOffset=False) if nearly_equal else plain_number)
    # Otherwise matplotlib labels minor ticks too, on top of these, where an axis spans less than a decade.
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
