"""How do numbers and figures leave the dashboard? As tables and pictures for a paper, with the code that makes them again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.choices import choose_one
from depthscope.app.dashboard.components.figure_numbers import cut_words, show_frame
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.drawing.matplotlib import write_figure
from depthscope.app.figures import CHOICES, Figure, FigureKind, Selection
from depthscope.app.figures.numbers import figure_table
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.comparison import summary_table
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.formats import to_csv, to_latex, to_parquet
from depthscope.app.tables.tables import Table, depth_table, mixing_table
from depthscope.app.text.bibliography import cut, keys_of
from depthscope.app.text.latex import cite, tex
from depthscope.app.text.numbers import number
from depthscope.app.text.terminal import command_line
from depthscope.app.text.venues import VENUES
from depthscope.app.text.visible import visible
from depthscope.diagnostics import CATALOGUE

__all__ = ["measure_python", "measure_table", "plain_frame", "show_exports"]

MEASURE, DEPTH, CONNECTION = "the measure above", "every measure by depth", "every measure by connection"
SUMMARY, FINDINGS = "summary of the runs", "findings"

MIMES = {"pdf": "application/pdf", "pgf": "application/x-tex", "svg": "image/svg+xml"}

_OPTIONS = ("scope", "tokens", "centering", "reduction")
"""Fields of a selection that the commands have options for."""

ALL_ROWS = 10**6
"""Also LaTeX has every row here: what is shown is what is saved."""


def show_exports(
    figure: Figure, kind: FigureKind, readings: Sequence[Reading], used: Mapping[str, Any]
) -> None:
    """A figure for a paper, and a table to take away, each with its code.

    ``figure``: what the page shows.
    ``used``: the choices that made it.
    """
    st.markdown("## Export")
    left, right = st.columns(2, gap="medium")
    with left:
        _show_paper_figure(figure, _measure_call("measure", readings, kind, used))
    with right, st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            what = choose_one("Table", [MEASURE, DEPTH, CONNECTION, SUMMARY, FINDINGS], "table", width=240)
            if what in (DEPTH, CONNECTION):
                names = {reading.name: reading for reading in readings}
                readings = [names[choose_one("Run", list(names), "table_run", width=200)]]
        _show_table(what, figure, kind, readings, used)


def _show_table(
    what: str, figure: Figure, kind: FigureKind, readings: Sequence[Reading], used: Mapping[str, Any]
) -> None:
    table: Table | None
    if what == MEASURE:
        table, python = measure_table(figure), measure_python(readings, kind, used)
        commands = _analyze_commands(readings, used, kind)
    elif what in (DEPTH, CONNECTION):
        table = (depth_table if what == DEPTH else mixing_table)(readings[0], rows=ALL_ROWS)
        commands = _analyze_commands(readings, {})
        python = _table_python("depth" if what == DEPTH else "connection", readings)
    elif what == SUMMARY:
        table, python = summary_table(readings), _table_python("summary", readings)
        commands = [command_line("compare", *_paths(readings), "--json")]
    else:
        table, python = findings_table(readings), _table_python("findings", readings)
        commands = [command_line("check", *_paths(readings), "--json")]
    if table is None or table.data.empty:
        st.info(f"{escaped(readings[0].name)} has no such numbers: choose another table or run.", icon="ℹ️")
        return
    _offer_table(table)
    st.caption("The same in a shell and in Python:")
    # A sign in the name of a file that turns the text around is shown as its escape.
    st.code(visible("\n".join(commands), lines=True), "bash", wrap_lines=True)
    st.code(python, "python", wrap_lines=True)


def _offer_table(table: Table) -> None:
    """A table with its caption, and as a file of each format."""
    data = plain_frame(table.data)
    cites = {name: CATALOGUE[name].cite for name in table.metrics if name in CATALOGUE}
    show_frame(data, height=min(38 + 35 * len(data), 250))
    undefined = int(data.isna().to_numpy().sum())
    gaps = f"{undefined} cells have no value" if undefined else ""
    size = "; ".join(filter(None, [f"{data.shape[0]} rows", gaps, cut_words(data)]))
    st.caption(f"{size}. {escaped(table.caption)}")
    with st.container(horizontal=True):
        for ending, label, mime, write in (
            ("csv", "CSV", "text/csv", lambda: to_csv(table).encode()),
            ("parquet", "Parquet", "application/vnd.apache.parquet", lambda: to_parquet(table)),
            ("tex", "LaTeX", "application/x-tex", lambda: to_latex(table, cites).encode()),
        ):
            st.download_button(
                label,
                write,  # only when it is asked for
                file_name=f"{table.name}.{ending}",
                mime=mime,
                key=f"table_{ending}",
                on_click="ignore",
            )


def measure_table(figure: Figure) -> Table:
    """The numbers of a figure as a table that every format can write."""
    data = figure_table(figure).rename(columns=str)
    printed = data.map(lambda value: number(float(value)) if isinstance(value, float) else str(value))
    return Table(figure.name, figure.title, figure.caption, data, printed, metrics=(figure.metric,))


def plain_frame(data: pd.DataFrame) -> pd.DataFrame:
    """A table that can be sent: names of columns differ, and text is text in which everything can be seen."""
    plain = pd.DataFrame(index=data.index)
    for position, name in enumerate(data.columns):
        shown = visible(name)
        column = data.iloc[:, position]
        # Two columns of one name, such as positions that round to the same one, are refused by every format.
        unique = shown if shown not in plain else f"{shown} ({position})"
        numeric = pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
        plain[unique] = (
            column
            if numeric
            else [None if pd.isna(v) else visible(v, lines=True) for v in column.astype(object)]
        )
    return plain


def _show_paper_figure(figure: Figure, call: str) -> None:
    """Buttons that save a figure for paper, the LaTeX that includes it, and the lines that make it.

    ``call``: of `ds.figures.measure`, without its closing bracket.
    """
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            venue = choose_one("Figure for", list(VENUES), "venue", width=160)
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
        st.caption("In LaTeX, with the sources that the caption cites as BibTeX:")
        # In no language: the highlighter takes what follows an escaped percent sign for a comment.
        st.code(figure_tex(figure), None, wrap_lines=True)
        if keys := figure_keys(figure):
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


def _paths(readings: Sequence[Reading]) -> list[Path]:
    return [Path(path) for path in dict.fromkeys(reading.path for reading in readings)]


def _analyze_commands(
    readings: Sequence[Reading], used: Mapping[str, Any], kind: FigureKind | None = None
) -> list[str]:
    """One command a run; what it computes is written to a file of its own, and the run is left as it is."""
    chosen = [f"{name}={used[name]}" for name in _OPTIONS if used.get(name) in CHOICES[name]]
    options = ["--select", ",".join(chosen)] if chosen else []
    metrics = ["--metrics", kind.metric] if kind else []
    return [
        command_line("analyze", path, *metrics, *options, "--out", f"metrics_{i}.zarr", "--json")
        for i, path in enumerate(_paths(readings), start=1)
    ]


def _table_python(name: str, readings: Sequence[Reading]) -> str:
    """Code that prints a table."""
    chain = f", chain={readings[0].chain!r}" if len(readings) == 1 and readings[0].chain else ""
    call = f"ds.figures.table({name!r}, {_path_list(readings)}{chain})"
    return f"import depthscope as ds\n\nprint({call}.to_csv(index=False))"


def measure_python(readings: Sequence[Reading], kind: FigureKind, used: Mapping[str, Any]) -> str:
    """Code that prints the numbers of a figure."""
    call = _measure_call("numbers", readings, kind, used)
    return f"import depthscope as ds\n\nprint({call}).to_csv(index=False))"


def _measure_call(
    function: str, readings: Sequence[Reading], kind: FigureKind, used: Mapping[str, Any]
) -> str:
    """The call of a public function with what is shown, without its closing bracket."""
    # The names of the runs are those of their paths, in the address and here the same only where they are unique: a heat map
    # of one run needs none.
    given = {name: value for name, value in used.items() if value != getattr(Selection(), name)}
    choices = [f"{name}={value!r}" for name, value in given.items() if name != "run"]
    return f"ds.figures.{function}({', '.join([repr(kind.name), _path_list(readings), *choices])}"


def _path_list(readings: Sequence[Reading]) -> str:
    return repr([str(path) for path in _paths(readings)])
