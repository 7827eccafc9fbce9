"""What does a venue ask of a figure? Width, type size and fonts, no text beyond the page, the same bytes again."""

from __future__ import annotations

import functools
import math
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)
from matplotlib.transforms import Bbox

from depthscope.app.text.latex import Latex, unicode_declarations
from depthscope.app.text.venues import VENUES
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


@contextmanager
def pgf_style() -> Iterator[None]:
    """Matplotlib's settings for PGF, which LaTeX sets in the fonts of the document."""
    if shutil.which("pdflatex") is None:
        raise InputError("PGF figures need pdflatex to measure their text; install LaTeX, or leave --pgf out")
    settings = {"pgf.texsystem": "pdflatex", "pgf.rcfonts": False, "pgf.preamble": unicode_declarations()}
    with mpl.rc_context(settings):
        yield


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
        "legend.frameon": True,
        "legend.framealpha": 0.85,
        "legend.edgecolor": "none",
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


def plain(text: str, *, longest: int | None = LONGEST_LABEL) -> str:
    r"""Text that matplotlib sets as it is: dollars are no mathematics, and what no installed font has is escaped.

    ``text``: any label; `Latex`, which is code for another typesetter, comes back unchanged.
    ``longest``: letters after which the middle is left out; None keeps all.

    Examples
    --------
    >>> plain("$x$"), plain("rank \ue000")
    ('\\$x\\$', 'rank \\ue000')
    """
    if isinstance(text, Latex):
        return text
    # Shortened twice: a text of megabytes is not looked at letter by letter, and escapes make it longer again.
    given = text if longest is None else shortened(text, LONGEST_NAME, counted=False)
    shown = visible(given, lines=True).strip("\u2068\u2069")
    if not shown.isascii():
        shown = "".join(letter if letter == "\n" or can_draw(letter) else escape(letter) for letter in shown)
    # The tables have long names in full.
    shown = shown if longest is None else shortened(shown, longest, counted=False)
    # A legend leaves out labels that begin with an underscore: matplotlib's own mark of what is internal.
    return (" " + shown if shown.startswith("_") else shown).replace("$", r"\$")


def inches_of(axes: Axes) -> tuple[float, float]:
    """Width and height of axes, as far as their figure's layout is known."""
    box, canvas = axes.get_window_extent(), axes.get_figure(root=True)
    assert canvas is not None  # axes that were removed from their figure are drawn into by nobody
    return box.width / canvas.dpi, box.height / canvas.dpi


def are_whole(values: np.ndarray) -> bool:
    """Whether positions are integers, so that their axis has no ticks between them."""
    return bool(np.all(np.mod(values, 1) == 0))


def wrapped(text: str, inches: float, points: float | None = None) -> str:
    """A label in as many lines as it takes to fit along an axis.

    ``text``: A label; `Latex` stays as it is.
    ``points``: type size; that of labels by default.
    """
    if isinstance(text, Latex):
        return text
    size = float(mpl.rcParams["font.size"]) if points is None else points
    # Room for three letters at least, so that narrow axes have no column of single ones.
    room = max(inches * 72, 3 * size)
    lines = [""]
    for word in plain(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if points_across(longer, size) <= room:
            lines[-1] = longer
            continue
        # A word that is longer than a line, such as a path, is broken where the line ends.
        start = 0
        for end in range(1, len(word) + 1):
            if points_across(word[start:end], size) > room:
                lines.append(word[start : end - 1])
                start = end - 1
        lines.append(word[start:])
    return "\n".join(line for line in lines if line)


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


# Layouts after which a label is left as it is: lines that are added make axes narrower, which may take one more.
MOST_LAYOUTS = 4
COLOUR_BAR = "<colorbar>"
"""The label that matplotlib gives the axes of a colour bar."""
GAP = 4.0
"""Points between a label and what is next to it: its width is that of outlines, which a screen rounds to its dots."""


class Label(NamedTuple):
    """A label with its words before they are wrapped, and the axes that it belongs to."""

    axes: Axes
    text: Text
    words: str


def label_axes(axes: Axes, x_label: str, y_label: str, inches: tuple[float, float]) -> list[Label]:
    """Label both axes, wrapped to a room in inches until `fit_labels` knows the real one."""
    words = (x_label, y_label)
    artists = (axes.xaxis.label, axes.yaxis.label)
    for artist, text, room in zip(artists, words, inches, strict=True):
        artist.set_text(wrapped(text, room))
    return [Label(axes, artist, text) for artist, text in zip(artists, words, strict=True)]


def fit_labels(canvas: Figure, labels: Sequence[Label]) -> None:
    """Lay a figure out, and wrap its labels to the room that this leaves them.

    ``canvas``: with an engine that lays it out.
    ``labels``: titles and labels of axes, also of colour bars.
    """
    engine = canvas.get_layout_engine()
    assert engine is not None
    # The layout leaves the widths of titles and labels out. It only gets tighter: wider rooms again would go back and forth.
    rooms = [float("inf")] * len(labels)
    for _ in range(MOST_LAYOUTS):
        engine.execute(canvas)
        taken = {axes: _taken(axes) for axes in canvas.axes}
        rooms = [min(room, _room(label, taken)) for room, label in zip(rooms, labels, strict=True)]
        lines = [
            wrapped(label.words, room / canvas.dpi, float(label.text.get_fontsize()))
            for room, label in zip(rooms, labels, strict=True)
        ]
        changed = [
            label.text for label, text in zip(labels, lines, strict=True) if label.text.get_text() != text
        ]
        for label, text in zip(labels, lines, strict=True):
            label.text.set_text(text)
        if not changed:
            return


def _taken(axes: Axes) -> Bbox:
    """What axes take with their ticks, and with their labels but for the overhang of these."""
    box = axes.get_tightbbox(for_layout_only=True)
    return axes.get_window_extent() if box is None else box


def _room(label: Label, taken: Mapping[Axes, Bbox]) -> float:
    """Pixels along a label."""
    own = label.axes.get_window_extent()
    canvas = label.axes.get_figure(root=True)
    assert canvas is not None
    if label.text is label.axes.yaxis.label:
        return own.height
    gap = GAP * canvas.dpi / 72
    row = {
        axes: box
        for axes, box in taken.items()
        if axes is not label.axes and box.y0 < own.y1 and own.y0 < box.y1
    }
    left = max([gap, *(box.x1 + gap for box in row.values() if box.x1 <= own.x0)])
    # Above its own colour bar a title may go on.
    ends = [box.x0 - gap for axes, box in row.items() if box.x0 >= own.x1 and axes.get_label() != COLOUR_BAR]
    right = min([canvas.bbox.width - gap, *ends])
    if label.text is label.axes.xaxis.label:
        middle = (own.x0 + own.x1) / 2
        return 2 * min(middle - left, right - middle)
    return right - own.x0
