"""Which numbers are shown? Tables to take away, with the commands and the Python code that make them again."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chart import build, card
from depthscope.app.dashboard.components.choices import choose_one
from depthscope.app.dashboard.components.controls import choose, chosen_run
from depthscope.app.dashboard.components.figure_numbers import cut_words, show_frame
from depthscope.app.dashboard.components.legend import show_legend
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.paper_figure import show_paper_figure
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import CHOICES, FIGURES, Figure, FigureKind, Selection
from depthscope.app.figures.numbers import figure_table
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.comparison import summary_table
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.formats import to_csv, to_latex
from depthscope.app.tables.tables import Table, depth_table, mixing_table
from depthscope.app.text.numbers import number
from depthscope.app.text.terminal import command_line
from depthscope.app.text.visible import visible
from depthscope.diagnostics import CATALOGUE

MEASURE, DEPTH, CONNECTION = "one measure", "every measure by depth", "every measure by connection"
SUMMARY, FINDINGS = "summary of the runs", "findings"

_OPTIONS = ("scope", "tokens", "centering", "reduction")
"""Fields of a selection that the commands have options for."""

ALL_ROWS = 10**6
"""Also LaTeX has every row here: what is shown is what is saved."""


def _show(chosen: ChosenRuns) -> None:
    readings = list(chosen.readings.values())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        what = choose_one("Table", [MEASURE, DEPTH, CONNECTION, SUMMARY, FINDINGS], "data_of", width=260)
        if what in (DEPTH, CONNECTION):
            readings = [chosen.readings[choose_one("Run", list(chosen.readings), "data_run")]]
    if what == MEASURE:
        _show_measure(chosen, readings)
        return
    if what in (DEPTH, CONNECTION):
        make = depth_table if what == DEPTH else mixing_table
        table = make(readings[0], rows=ALL_ROWS)
        if table is None or table.data.empty:
            st.info(
                f"{escaped(readings[0].name)} has no numbers along {'its depth' if what == DEPTH else 'connections'}: "
                "choose another table or another run.",
                icon="ℹ️",
            )
            return
        show_table(table)
        _show_code(
            _analyze_commands(readings, {}),
            _table_python("depth" if what == DEPTH else "connection", readings),
        )
    elif what == SUMMARY:
        show_table(summary_table(readings))
        _show_code([command_line("compare", *_paths(readings), "--json")], _table_python("summary", readings))
    else:
        show_table(findings_table(readings))
        _show_code([command_line("check", *_paths(readings), "--json")], _table_python("findings", readings))


def _show_measure(chosen: ChosenRuns, readings: Sequence[Reading]) -> None:
    names = [name for name, kind in FIGURES.items() if chosen.feeding(kind.needs)]
    if not names:
        st.info("No measure of the chosen runs has a number that is defined.", icon="ℹ️")
        return
    name = choose_one("Measure", names, "data_measure", words=lambda each: FIGURES[each].title, width=340)
    kind = FIGURES[name]
    selection = choose([kind], chosen.analyses)
    if "run" in kind.uses:
        selection["run"] = chosen_run(chosen.feeding(kind.needs))
        readings = [chosen.readings[selection["run"]]]
    figure = build(kind, chosen.analyses, selection)
    show_legend(colour_numbers(chosen.analyses))
    card(figure, key="data_figure", height=300)
    used = {key: value for key, value in selection.items() if key in kind.uses}
    show_table(measure_table(figure))
    _show_code(_analyze_commands(readings, used, kind), measure_python(readings, kind, used))
    show_paper_figure(figure, _measure_call("measure", readings, kind, used))


def measure_table(figure: Figure) -> Table:
    """The numbers of a figure as a table that every format can write."""
    data = figure_table(figure).rename(columns=str)
    printed = data.map(lambda value: number(float(value)) if isinstance(value, float) else str(value))
    return Table(figure.name, figure.title, figure.caption, data, printed, metrics=(figure.metric,))


def show_table(table: Table) -> None:
    """A table with its caption, and as a file of each format."""
    data = plain_frame(table.data)
    cites = {name: CATALOGUE[name].cite for name in table.metrics if name in CATALOGUE}
    with st.container(border=True):
        st.markdown(f"**{escaped(table.title)}**")
        show_frame(data, height=min(38 + 35 * len(data), 380))
        undefined = int(data.isna().to_numpy().sum())
        gaps = f"{undefined} cells have no value" if undefined else ""
        size = "; ".join(filter(None, [f"{data.shape[0]} rows", gaps, cut_words(data)]))
        st.caption(f"{size}. {escaped(table.caption)}")
        with st.container(horizontal=True):
            for ending, mime, write in (
                ("csv", "text/csv", lambda: to_csv(table).encode()),
                ("parquet", "application/vnd.apache.parquet", lambda: parquet_bytes(data)),
                ("tex", "application/x-tex", lambda: to_latex(table, cites).encode()),
            ):
                st.download_button(
                    {"csv": "CSV", "parquet": "Parquet", "tex": "LaTeX"}[ending],
                    write,  # only when it is asked for
                    file_name=f"{table.name}.{ending}",
                    mime=mime,
                    key=f"data_{ending}",
                    on_click="ignore",
                )


def plain_frame(data: pd.DataFrame) -> pd.DataFrame:
    """A table that can be sent and saved: names of columns differ, and text is text in which everything can be seen."""
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


def parquet_bytes(data: pd.DataFrame) -> bytes:
    """A table as Parquet."""
    file = io.BytesIO()
    data.to_parquet(file, index=False)
    return file.getvalue()


def _show_code(commands: Sequence[str], python: str) -> None:
    st.caption("The same in a shell:")
    # A sign in the name of a file that turns the text around is shown as its escape.
    st.code(visible("\n".join(commands), lines=True), "bash", wrap_lines=True)
    st.caption("The same in Python:")
    st.code(python, "python", wrap_lines=True)


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


PAGE = Page(
    title="Data",
    url_path="data",
    help="Which numbers are behind a figure, and which code reproduces them?",
    show=_show,
)
