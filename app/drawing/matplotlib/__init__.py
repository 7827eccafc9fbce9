"""How does a figure look on paper? One specification drawn by matplotlib, to PDF, SVG or PGF."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from depthscope.app.drawing.matplotlib.curves import draw_lines
from depthscope.app.drawing.matplotlib.matrices import draw_heatmap
from depthscope.app.drawing.matplotlib.style import WIDTHS, Width, figure_style, pgf_style
from depthscope.app.figures.specification import Figure, Heatmap

__all__ = ["FORMATS", "WIDTHS", "Width", "figure_style", "to_matplotlib", "to_svg", "write_figure"]

FORMATS = ("pdf", "svg", "pgf", "png")
# A date in the file would change its bytes on every export.
UNDATED: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


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
    with figure_style(width) as size:
        return draw_heatmap(figure, size) if isinstance(figure, Heatmap) else draw_lines(figure, size)


def write_figure(figure: Figure, *paths: Path, width: str = "icml") -> None:
    """Draw a figure once and write it to files; their endings say the formats.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw.
    *paths : Path
        End in ``.pdf``, ``.svg``, ``.pgf`` or ``.png``.
    width : str
        A key of `WIDTHS`.

    Raises
    ------
    ValueError
        For a width or an ending that is not known, or PGF without LaTeX.
    """
    # All endings before the first file: a wrong one leaves none of them.
    for path in paths:
        if path.suffix.removeprefix(".") not in FORMATS:
            raise ValueError(f"cannot draw {path.name!r}; expected an ending of {', '.join(FORMATS)}")
    with figure_style(width):
        canvas = _laid_out(figure, width)
        for path in paths:
            ending = path.suffix.removeprefix(".")
            if ending != "pgf":
                canvas.savefig(path, metadata=UNDATED.get(ending))
                continue
            from depthscope.app.text.latex import tex

            # LaTeX sets the words of a PGF figure: it is drawn again with its labels escaped, which the other formats
            # would print as they are.
            with pgf_style():
                to_matplotlib(translated(figure, tex), width=width).savefig(path)


def translated(figure: Figure, translate: Callable[[str], str]) -> Figure:
    """A figure with its labels translated.

    Parameters
    ----------
    figure : Lines or Heatmap
        A figure.
    translate : function
        Text in, text out.

    Returns
    -------
    Lines or Heatmap
    """
    across, up = translate(figure.x_label), translate(figure.y_label)
    if isinstance(figure, Heatmap):
        return replace(figure, x_label=across, y_label=up, z_label=translate(figure.z_label))
    lines = tuple(replace(line, label=translate(line.label)) for line in figure.lines)
    return replace(figure, x_label=across, y_label=up, lines=lines)


def _laid_out(figure: Figure, width: str) -> Canvas:
    canvas = to_matplotlib(figure, width=width)
    # The layout is computed once, not for every format.
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    return canvas


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
    buffer = io.StringIO()
    with figure_style(width):
        _laid_out(figure, width).savefig(buffer, format="svg", metadata=UNDATED["svg"])
    text = buffer.getvalue()
    # The XML declaration and the document type are allowed at the start of a document only, not inside a page.
    element = text[text.index("<svg") :]
    # matplotlib names its clip paths by their content: two figures on a page may have the same id.
    for before in ('id="', 'href="#', "url(#"):
        element = element.replace(before, f"{before}{figure.name}-")
    return element
