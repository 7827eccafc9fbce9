"""How does a figure look on paper? One specification drawn by matplotlib, to PDF, SVG or PGF."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from app.figures.specification import Figure, Heatmap
from app.printed.curves import draw_lines
from app.printed.matrices import draw_heatmap
from app.printed.style import WIDTHS, Width, style

__all__ = ["FORMATS", "WIDTHS", "Width", "style", "to_matplotlib", "to_svg", "write_figure"]

FORMATS = ("pdf", "svg", "pgf", "png")


def to_matplotlib(figure: Figure, *, width: str = "icml") -> Canvas:
    """Draw a figure for paper.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw; the title goes to the caption.
    width : str
        A key of `WIDTHS`.

    Returns
    -------
    matplotlib.figure.Figure
        Independent of pyplot's state.

    Raises
    ------
    ValueError
        For a width that is not known.
    """
    with style(width) as size:
        return draw_heatmap(figure, size) if isinstance(figure, Heatmap) else draw_lines(figure, size)


def write_figure(figure: Figure, path: Path, *, width: str = "icml") -> Path:
    """Draw a figure to a file; its ending says the format.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw.
    path : Path
        Ends in ``.pdf``, ``.svg``, ``.pgf`` or ``.png``.
    width : str
        A key of `WIDTHS`.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        For a width or an ending that is not known.
    """
    ending = path.suffix.removeprefix(".")
    if ending not in FORMATS:
        raise ValueError(f"cannot draw {path.name!r}; expected an ending of {', '.join(FORMATS)}")
    path.write_bytes(_bytes(figure, ending, width))
    return path


def to_svg(figure: Figure, *, width: str = "neurips") -> str:
    """A figure as an SVG element, its ids marked by its name so that several share a page.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw.
    width : str
        A key of `WIDTHS`.

    Returns
    -------
    str
        From ``<svg`` on, without the XML declaration.
    """
    text = _bytes(figure, "svg", width).decode()
    element = text[text.index("<svg") :]
    for before in ('id="', 'href="#', "url(#"):
        element = element.replace(before, f"{before}{figure.name}-")
    return element


def _bytes(figure: Figure, ending: str, width: str) -> bytes:
    buffer = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with style(width):
        to_matplotlib(figure, width=width).savefig(buffer, format=ending, metadata=undated.get(ending))
    return buffer.getvalue()
