"""How does an export enter a LaTeX document? As snippets to input, or as an article of the venue's size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from depthscope.app.figures.composed import Composed
from depthscope.app.tables.tables import Table
from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.latex import CITEP, Latex
from depthscope.app.text.templates import latex_template
from depthscope.app.text.venues import Venue

_HERE = "depthscope.app.paper"
PACKAGES = "amsmath,array,booktabs,graphicx"
HEAD = f"{CITEP}\n\\providecommand{{\\depthscopepath}}{{.}}\n"
_CITE = re.compile(r"\\citep\{([^}]+)\}")


def _head(name: str) -> Latex:
    """What a document needs before it inputs a snippet."""
    return Latex(
        "% Written by depthscope. In your document:\n"
        rf"%   \usepackage{{{PACKAGES}}}" + "\n"
        "%   \\newcommand{\\depthscopepath}{paper}  % the folder of this file, seen from your document\n"
        rf"%   \input{{\depthscopepath/{name}.tex}}" + "\n" + HEAD
    )


def figures_tex(figures: Sequence[Composed], cites: Mapping[str, str], venue: Venue) -> str:
    """A float across the text for every composed figure."""
    cited = [
        (figure, keys_of([*(cites.get(metric, "") for metric in figure.metrics), *figure.sources]))
        for figure in figures
    ]
    return latex_template(_HERE, "figures.tex.jinja").render(
        head=_head("figures"), figures=cited, environment="figure*" if venue.two_columns else "figure"
    )


def tables_tex(tables: Sequence[Table]) -> str:
    """An input for every table of the text."""
    return latex_template(_HERE, "tables.tex.jinja").render(head=_head("tables"), tables=tables)


def methods_tex(paragraphs: Sequence[Latex]) -> str:
    """The methods as paragraphs."""
    return "% Written by depthscope: what was measured, and how.\n" + HEAD + "\n\n".join(paragraphs) + "\n"


def main_tex(venue: Venue, *, cites: bool) -> str:
    """A sample article that compiles: methods, composed figures, tables, and sources."""
    return latex_template(_HERE, "main.tex.jinja").render(
        options=Latex(f"{venue.body}pt" + (",twocolumn" if venue.two_columns else "")),
        geometry=Latex(
            f"textwidth={venue.text:.4f}in,textheight={venue.height:.4f}in"
            + (f",columnsep={venue.separation:.4f}in" if venue.two_columns else "")
        ),
        packages=PACKAGES,
        cites=cites,
        natbib=venue.author_year,
        two_columns=venue.two_columns,
    )


def cited_keys(texts: Iterable[str]) -> list[str]:
    """The bibliography keys that some LaTeX cites."""
    return sorted({key for text in texts for group in _CITE.findall(text) for key in group.split(",")})
