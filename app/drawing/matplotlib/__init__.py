"""How does a figure look on paper? One specification drawn by matplotlib, to PDF, SVG or PGF."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from depthscope.app.drawing.matplotlib.composed import draw_composed, draw_into
from depthscope.app.drawing.matplotlib.curves import HEALTHY, draw_lines
from depthscope.app.drawing.matplotlib.matrices import DENSE, DENSE_ON_A_PAGE, draw_heatmap
from depthscope.app.drawing.matplotlib.style import FIGURE_POINTS, WIDTHS, Width, figure_style, pgf_style
from depthscope.app.figures.composed import Composed, Points
from depthscope.app.figures.specification import Figure, Heatmap, Lines
from depthscope.app.text.latex import Latex, tex
from depthscope.diagnostics.errors import InputError

__all__ = [
    "FIGURE_POINTS",
    "FORMATS",
    "WIDTHS",
    "Latex",
    "Lines",
    "Width",
    "draw_composed",
    "draw_into",
    "figure_style",
    "to_matplotlib",
    "to_svg",
    "write_figure",
]

FORMATS = ("pdf", "svg", "pgf", "png")


def to_matplotlib(figure: Figure, *, width: str | Width = "icml") -> Canvas:
    """Draw a figure for paper.

    ``figure``: what to draw; the title goes to the caption.
    ``width``: a key of `WIDTHS`.
    Returns: Independent of pyplot's state.
    Raises InputError: For a width that is not known.
    """
    with figure_style(width) as size:
        return _drawn(figure, size)


def write_figure(figure: Figure | Composed, *paths: Path, width: str | Width = "icml") -> None:
    """Draw a figure once and write it to files; their endings say the formats.

    ``*paths``: end in ``.pdf``, ``.svg``, ``.pgf`` or ``.png``.
    ``width``: A key of `WIDTHS`, or any other width.
    Raises InputError: For a width or an ending that is not known, or PGF without LaTeX.
    """
    # All endings before the first file: a wrong one leaves none of them.
    for path in paths:
        if path.suffix.removeprefix(".") not in FORMATS:
            raise InputError(f"cannot draw {path.name!r}; expected an ending of {', '.join(FORMATS)}")
    with figure_style(width) as size:
        canvas = _laid_out(_drawn(figure, size))
        for path in paths:
            ending = path.suffix.removeprefix(".")
            if ending != "pgf":
                canvas.savefig(path)
                continue
            # LaTeX sets the words of a PGF figure: it is drawn again with its labels escaped, which the other formats
            # would print as they are.
            with pgf_style():
                # Where a PGF figure is measured there are no pictures of words.
                _drawn(translated(figure, tex), size).savefig(path)


def translated(figure: Any, translate: Callable[[str], str]) -> Any:
    """A figure with its labels translated."""
    if isinstance(figure, Composed):
        panels = [
            replace(
                panel,
                title=translate(panel.title),
                content=translated(panel.content, translate),
            )
            for panel in figure.panels
        ]
        return replace(figure, panels=tuple(panels), runs=_translated_runs(figure.runs, translate))
    across, up = translate(figure.x_label), translate(figure.y_label)
    if isinstance(figure, Heatmap):
        names = tuple(map(translate, figure.x_names))
        return replace(figure, x_label=across, y_label=up, z_label=translate(figure.z_label), x_names=names)
    if isinstance(figure, Points):
        points = {translate(run): values for run, values in figure.points.items()}
        return replace(
            figure, x_label=across, y_label=up, points=points, runs=_translated_runs(figure.runs, translate)
        )
    # The group too: it is compared with the names of the runs.
    lines = tuple(
        replace(line, label=translate(line.label), group=translate(line.group)) for line in figure.lines
    )
    runs = _translated_runs(figure.runs, translate)
    return replace(figure, x_label=across, y_label=up, lines=lines, runs=runs)


def _translated_runs(runs: Mapping[str, int], translate: Callable[[str], str]) -> dict[str, int]:
    return {translate(run): number for run, number in runs.items()}


def _drawn(figure: Figure | Composed, size: Width, *, dense: int = DENSE) -> Canvas:
    if isinstance(figure, Composed):
        return draw_composed(figure, size)
    return (
        draw_heatmap(figure, size, dense=dense) if isinstance(figure, Heatmap) else draw_lines(figure, size)
    )


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
    "legend.frameon": False,  # on a dark page a white box; the reader's font may be wider than it
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


def to_svg(figure: Figure, *, width: str = "neurips", page: bool = False) -> str:
    """A figure as an SVG element, its ids marked by its name so that several share a page.

    ``page``: for a page in HTML: letters are text, ink has the colour of the page's text, and the page shows through.
    Returns: From ``<svg`` on, without the XML declaration.
    """
    buffer = io.StringIO()
    with figure_style(width) as size, mpl.rc_context(_ON_A_PAGE if page else {}):
        canvas = _laid_out(_drawn(figure, size, dense=DENSE_ON_A_PAGE if page else DENSE))
        canvas.savefig(buffer, format="svg", transparent=page)
    text = buffer.getvalue()
    if page:
        text = _for_any_page(text)
    # The XML declaration and the document type are allowed at the start of a document only, not inside a page.
    element = text[text.index("<svg") :]
    # matplotlib names its clip paths by their content: two figures on a page may have the same id.
    for before in ('id="', 'href="#', "url(#"):
        element = element.replace(before, f"{before}{figure.name}-")
    return element
