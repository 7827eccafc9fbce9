"""How does an export enter a LaTeX document? As snippets, with a preamble for their signs, or as a document of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from depthscope.app.figures import Figure
from depthscope.app.tables.tables import Table
from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.latex import unicode_declarations
from depthscope.app.text.templates import latex_template

_HERE = "depthscope.app.paper"
# 6.75 in of text and a gap of 0.25 leave 3.25 for each column, the widths in `WIDTHS`.
_TWO_COLUMNS = ("10pt,twocolumn", "textwidth=6.75in,columnsep=0.25in,textheight=9in")
# Options of the class and of the page for a document in which figures of each width fit.
_PAGES = {
    "icml": _TWO_COLUMNS,
    "full": _TWO_COLUMNS,
    "neurips": ("10pt", "textwidth=5.5in,textheight=9in"),
}


def figures_tex(figures: Sequence[Figure], cites: Mapping[str, str], width: str) -> str:
    """A float for every figure, with its caption and source.

    Parameters
    ----------
    figures : sequence of Lines or Heatmap
        Figures whose PDF is in figures/.
    cites : mapping of str to str
        Bibliography keys by metric.
    width : str
        ``"full"`` spans both columns.

    Returns
    -------
    str
    """
    cited = [(figure, keys_of([cites.get(figure.metric, ""), *figure.sources])) for figure in figures]
    # Only the starred float spans both columns.
    float_name = "figure*" if width == "full" else "figure"
    return latex_template(_HERE, "snippet.tex.jinja").render(
        name="figures", figures=cited, float=float_name, tables=()
    )


def tables_tex(tables: Sequence[Table]) -> str:
    """An input for every table.

    Parameters
    ----------
    tables : sequence of Table
        Tables whose LaTeX is in tables/.

    Returns
    -------
    str
    """
    return latex_template(_HERE, "snippet.tex.jinja").render(name="tables", figures=(), tables=tables)


def preamble_tex() -> str:
    """Declarations that let pdfLaTeX set the signs of PGF figures.

    Returns
    -------
    str
    """
    return "% For PGF figures: \\usepackage{pgf}, then this file.\n" + unicode_declarations()


def main_tex(width: str) -> str:
    """A document that compiles: all tables, all figures, the sources.

    Parameters
    ----------
    width : str
        Width that the figures were drawn for.

    Returns
    -------
    str
    """
    options, geometry = _PAGES[width]
    return latex_template(_HERE, "main.tex.jinja").render(options=options, geometry=geometry)
