"""How does a figure get from the page into a paper? At the width of a venue, with its caption, its sources and its code."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import streamlit as st

from depthscope.app.dashboard.components.choices import choose_one
from depthscope.app.drawing.matplotlib import write_figure
from depthscope.app.figures import Figure
from depthscope.app.text.bibliography import cut, keys_of
from depthscope.app.text.latex import cite, tex
from depthscope.app.text.venues import VENUES
from depthscope.diagnostics import CATALOGUE

__all__ = ["show_paper_figure"]

MIMES = {"pdf": "application/pdf", "pgf": "application/x-tex", "svg": "image/svg+xml"}


def show_paper_figure(figure: Figure, call: str) -> None:
    """Buttons that save a figure for paper, the LaTeX that includes it, and the three lines that make it.

    ``call``: of `ds.figures.measure`, without its closing bracket.
    """
    with st.container(border=True):
        st.markdown("## For a paper")
        with st.container(horizontal=True, vertical_alignment="bottom"):
            venue = choose_one("Venue", list(VENUES), "venue", width=160)
            for ending, mime in MIMES.items():
                st.download_button(
                    ending.upper(),
                    lambda ending=ending: _written(figure, ending, venue),  # only when it is asked for
                    file_name=f"{figure.name}.{ending}",
                    mime=mime,
                    key=f"paper_{ending}",
                    on_click="ignore",
                    # LaTeX measures the words of a PGF figure.
                    disabled=ending == "pgf" and shutil.which("pdflatex") is None,
                )
        st.caption("In LaTeX:")
        # In no language: the highlighter takes what follows an escaped percent sign for a comment.
        st.code(figure_tex(figure), None, wrap_lines=True)
        if keys := figure_keys(figure):
            st.caption("The sources that the caption cites, as BibTeX:")
            st.code(cut(keys).strip(), "bibtex", wrap_lines=True)
        st.caption("The same in Python:")
        code = f"import depthscope as ds\n\nfigure = {call}, venue={venue!r})\nfigure.savefig({f'{figure.name}.pdf'!r})"
        st.code(code, "python", wrap_lines=True)


def figure_tex(figure: Figure) -> str:
    """The figure environment, with the caption and what it cites."""
    keys = figure_keys(figure)
    cited = f" {cite(keys)}" if keys else ""
    return "\n".join(
        [
            r"\begin{figure}",
            r"  \centering",
            rf"  \includegraphics{{{figure.name}.pdf}}",
            rf"  \caption{{{tex(f'{figure.title}. {figure.caption}')}{cited}}}",
            rf"  \label{{fig:{figure.name}}}",
            r"\end{figure}",
        ]
    )


def figure_keys(figure: Figure) -> list[str]:
    """The keys of the bibliography that the figure cites: those of its metric and of the laws that it draws."""
    own = [CATALOGUE[figure.metric].cite] if figure.metric in CATALOGUE else []
    return keys_of([*own, *figure.sources])


def _written(figure: Figure, ending: str, venue: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"figure.{ending}")
        write_figure(figure, path, width=venue)
        return path.read_bytes()
