"""How do numbers and figures leave the dashboard? As tables and pictures for a paper, with the code that makes them again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from depthscope.app.dashboard.components.controls import choose_one
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.figures import Figure, FigureKind, Selection
from depthscope.app.figures.specification import figure_table
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.formats import to_csv, to_latex, to_parquet
from depthscope.app.tables.tables import Table
from depthscope.app.text.bibliography import cut, keys_of
from depthscope.app.text.latex import VENUES, cite, tex
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE

MIMES = {"pdf": "application/pdf", "svg": "image/svg+xml"}


def show_exports(
    figure: Figure, kind: FigureKind, readings: Sequence[Reading], used: Mapping[str, Any]
) -> None:
    """A figure for a paper, and its numbers to take away, each with its code."""
    st.markdown("## Export")
    left, right = st.columns(2, gap="medium")
    # What is not said is the default; names of runs are those of their paths, so that a heat map of one run needs none.
    given = {name: value for name, value in used.items() if value != getattr(Selection(), name)}
    paths = [Path(path) for path in dict.fromkeys(reading.path for reading in readings)]
    words = [repr(kind.name), repr(list(map(str, paths)))]
    words += [f"{name}={value!r}" for name, value in given.items() if name != "run"]
    with left, st.container(border=True):
        _show_paper_figure(figure, f"ds.figures.measure({', '.join(words)}")
    with right, st.container(border=True):
        _offer_table(measure_table(figure))
        st.caption("The same in Python:")
        call = f"ds.figures.numbers({', '.join(words)})"
        st.code(f"import depthscope as ds\n\nprint({call}.to_csv(index=False))", "python", wrap_lines=True)


def _offer_table(table: Table) -> None:
    """The file of a table in each format; its card shows the numbers."""
    cites = {name: CATALOGUE[name].cite for name in table.metrics if name in CATALOGUE}
    undefined = int(table.data.isna().to_numpy().sum())
    gaps = f", {undefined} cells have no value" if undefined else ""
    st.caption(f"The numbers: {len(table.data)} rows{gaps}. {escaped(table.caption)}")
    with st.container(horizontal=True):
        for ending, label, mime, write in (
            ("csv", "CSV", "text/csv", lambda: to_csv(table).encode()),
            ("parquet", "Parquet", "application/vnd.apache.parquet", lambda: to_parquet(table)),
            ("tex", "LaTeX", "application/x-tex", lambda: to_latex(table, cites).encode()),
        ):
            _offer(label, write, f"{table.name}.{ending}", mime, f"table_{ending}")


def _offer(label: str, write: Callable[[], bytes], name: str, mime: str, key: str) -> None:
    """A button that saves a file, which is written when it is asked for."""
    st.download_button(label, write, file_name=name, mime=mime, key=key, on_click="ignore")


def measure_table(figure: Figure) -> Table:
    """The numbers of a figure as a table that every format can write."""
    data = figure_table(figure).rename(columns=str)
    printed = data.map(lambda value: number(float(value)) if isinstance(value, float) else str(value))
    return Table(figure.name, figure.title, figure.caption, data, printed, metrics=(figure.metric,))


def _show_paper_figure(figure: Figure, call: str) -> None:
    """Buttons that save a figure for paper, the LaTeX that includes it, and the lines that make it."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        venue = choose_one("Figure for", list(VENUES), "venue", width=160)
        for ending, mime in MIMES.items():
            write = partial(_written, figure, ending, venue)
            _offer(ending.upper(), write, f"{figure.name}.{ending}", mime, f"paper_{ending}")
    own = [CATALOGUE[figure.metric].cite] if figure.metric in CATALOGUE else []
    keys = keys_of([*own, *figure.sources])
    st.caption("In LaTeX, with the sources that the caption cites as BibTeX:")
    # In no language: the highlighter takes what follows an escaped percent sign for a comment.
    st.code(figure_tex(figure, keys), None, wrap_lines=True)
    if keys:
        st.code(cut(keys).strip(), "bibtex", wrap_lines=True)
    st.caption("The same in Python:")
    code = f"import depthscope as ds\n\nfigure = {call}, venue={venue!r})\nfigure.savefig({f'{figure.name}.pdf'!r})"
    st.code(code, "python", wrap_lines=True)


def figure_tex(figure: Figure, keys: Sequence[str]) -> str:
    """The figure environment, with the caption and what it cites."""
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


def _written(figure: Figure, ending: str, venue: str) -> bytes:
    # Here: matplotlib takes 25 MB, which a server that writes no figure does without.
    from depthscope.app.drawing.matplotlib import write_figure

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"figure.{ending}")
        write_figure(figure, path, width=venue)
        return path.read_bytes()
