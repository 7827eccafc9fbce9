"""How does a figure look on paper? One specification drawn by matplotlib, to PDF, SVG or PNG."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from depthscope.app.drawing.matplotlib.composed import draw, draw_into
from depthscope.app.drawing.matplotlib.curves import DENSE, DENSE_ON_A_PAGE, HEALTHY
from depthscope.app.drawing.matplotlib.style import FIGURE_POINTS, WIDTHS, Width, figure_style
from depthscope.app.figures.composed import Composed
from depthscope.app.figures.specification import Figure
from depthscope.diagnostics.errors import InputError

__all__ = [
    "DENSE",
    "FIGURE_POINTS",
    "FORMATS",
    "WIDTHS",
    "Width",
    "draw_into",
    "figure_style",
    "to_matplotlib",
    "to_svg",
    "write_figure",
]

FORMATS = ("pdf", "svg", "png")


def to_matplotlib(figure: Figure | Composed, *, width: str | Width = "icml") -> Canvas:
    """Draw a figure for paper.

    ``figure``: what to draw; the title goes to the caption.
    ``width``: a key of `WIDTHS`, or any other width.
    Returns: Independent of pyplot's state.
    Raises InputError: For a width that is not known.
    """
    with figure_style(width) as size:
        return draw(figure, size)


def write_figure(figure: Figure | Composed, *paths: Path, width: str | Width = "icml") -> None:
    """Draw a figure once and write it to files; their endings say the formats.

    Raises InputError: For a width or an ending that is not known.
    """
    # All endings before the first file: a wrong one leaves none of them.
    for path in paths:
        if path.suffix.removeprefix(".") not in FORMATS:
            raise InputError(f"cannot draw {path.name!r}; expected an ending of {', '.join(FORMATS)}")
    with figure_style(width) as size:
        canvas = _laid_out(draw(figure, size))
        for path in paths:
            canvas.savefig(path)


def _laid_out(canvas: Canvas) -> Canvas:
    # The layout is computed once, not for every format; with any engine, also one that does nothing, savefig would draw
    # everything once more for it.
    engine = canvas.get_layout_engine()
    assert engine is not None
    engine.execute(canvas)
    with mpl.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        canvas.set_layout_engine(None)
    return canvas


# Letters as text in the reader's own font: they can be found and copied, and take a third of the room of their outlines.
_ON_A_PAGE = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "mathtext.fontset": "dejavusans"},
    "axes.facecolor": "none",  # white boxes would glare on a dark page
}


def _for_any_page(text: str) -> str:
    """Ink in the colour of the page's text, the healthy band as a veil over it, and nothing that a browser does not need."""
    text = text.replace("#000000", "currentColor").replace(HEALTHY.lower(), "#2288331f")
    # What has no colour of its own, such as letters.
    text = text.replace("<svg ", '<svg fill="currentColor" ', 1)
    text = _COORDINATES.sub(lambda found: _DIGITS.sub(r"\1", found[0]), text)
    # A third of the file: line breaks, comments, and names of parts that nothing refers to.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    return re.sub(r"\s*\n\s*", " ", text)


# A hundredth of a point is less than any screen shows.
_COORDINATES = re.compile(r' (?:d|x|y)="[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")


def to_svg(figure: Figure, *, width: str = "neurips") -> str:
    """A figure as an SVG element for a page in HTML: letters are text, ink has the colour of the page's text.

    Its ids are marked by its name, so that several share a page.
    """
    buffer = io.StringIO()
    with figure_style(width) as size, mpl.rc_context(_ON_A_PAGE):
        canvas = _laid_out(draw(figure, size, dense=DENSE_ON_A_PAGE))
        canvas.savefig(buffer, format="svg", transparent=True)
    text = _for_any_page(buffer.getvalue())
    # The XML declaration and the document type are allowed at the start of a document only, not inside a page.
    element = text[text.index("<svg") :]
    # matplotlib names its clip paths by their content: two figures on a page may have the same id.
    for before in ('id="', 'href="#', "url(#"):
        element = element.replace(before, f"{before}{figure.name}-")
    return element
