"""How does an export enter a LaTeX document? As snippets, with a preamble for their signs, or whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from depthscope.app.figures import Figure
from depthscope.app.tables.formats import SIGNS, tex
from depthscope.app.tables.tables import Table
from depthscope.app.text.bibliography import keys_of, sources_of

_USE = r"""% Written by depthscope export. In your document:
%   \usepackage{amsmath,graphicx,booktabs}
%   \newcommand{\depthscopepath}{paper}  % the folder of this file, seen from your document
%   \input{\depthscopepath/%s.tex}
\providecommand{\depthscopepath}{.}
"""

_CLASSES = {
    "icml": (r"\documentclass[10pt,twocolumn]{article}", "textwidth=6.75in,columnsep=0.25in,textheight=9in"),
    "full": (r"\documentclass[10pt,twocolumn]{article}", "textwidth=6.75in,columnsep=0.25in,textheight=9in"),
    "neurips": (r"\documentclass[10pt]{article}", "textwidth=5.5in,textheight=9in"),
}

_DOCUMENT = r"""%(documentclass)s
\usepackage[%(geometry)s]{geometry}
\IfFileExists{lmodern.sty}{\usepackage[T1]{fontenc}\usepackage{lmodern}}{}
\usepackage{amsmath,graphicx,booktabs}
\input{preamble}
\extrafloats{200}
\begin{document}
\title{Signal propagation}
\author{}
\date{}
\maketitle
\nocite{*}
\input{tables}
\input{figures}
\clearpage
\bibliographystyle{plain}
\bibliography{metrics}
\end{document}
"""


def figures_tex(figures: Sequence[Figure], cites: Mapping[str, str], width: str) -> str:
    """A float for every figure, with its caption and source.

    Parameters
    ----------
    figures : sequence of Lines or Heatmap
        Figures that lie in figures/ as PDF.
    cites : mapping of str to str
        Bibliography keys by metric.
    width : str
        ``"full"`` spans both columns.

    Returns
    -------
    str
    """
    float_name = "figure*" if width == "full" else "figure"
    return _USE.replace("%s", "figures") + "".join(_figure(figure, cites, float_name) for figure in figures)


def _figure(figure: Figure, cites: Mapping[str, str], float_name: str) -> str:
    keys = keys_of([cites.get(figure.metric, ""), *sources_of(figure)])
    source = rf"~\cite{{{','.join(keys)}}}" if keys else ""
    return "\n".join(
        [
            "",
            rf"\begin{{{float_name}}}[t]",
            r"\centering",
            rf"\includegraphics{{\depthscopepath/figures/{figure.name}.pdf}}",
            rf"\caption{{\textbf{{{tex(figure.title)}}}{source}. {tex(figure.caption)}}}",
            rf"\label{{fig:{figure.name}}}",
            rf"\end{{{float_name}}}",
            "",
        ]
    )


def tables_tex(tables: Sequence[Table]) -> str:
    """An input for every table.

    Parameters
    ----------
    tables : sequence of Table
        Tables that lie in tables/ as LaTeX.

    Returns
    -------
    str
    """
    inputs = (rf"\input{{\depthscopepath/tables/{table.name}.tex}}" for table in tables)
    return _USE.replace("%s", "tables") + "\n".join(inputs) + "\n"


def preamble_tex() -> str:
    """Declarations that let pdfLaTeX set the signs of PGF figures.

    Returns
    -------
    str
    """
    declared = (
        rf"\DeclareUnicodeCharacter{{{ord(sign):04X}}}{{\ensuremath{{{code.strip('$')}}}}}"
        for sign, code in SIGNS.items()
        if not sign.isascii() and code.startswith("$")
    )
    return "% For PGF figures: \\usepackage{pgf}, then this file.\n" + "\n".join(declared) + "\n"


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
    documentclass, geometry = _CLASSES[width]
    return _DOCUMENT % {"documentclass": documentclass, "geometry": geometry}
