"""How is a figure shown on a page? Drawn by plotly, with its caption and its numbers as a table and a CSV file."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.drawing.plotly import shrink, to_plotly
from depthscope.app.drawing.plotly.cells import words
from depthscope.app.figures import Figure, FigureKind, Heatmap, Lines
from depthscope.app.figures.palette import SHAPES, look_of
from depthscope.app.figures.specification import figure_table
from depthscope.app.tables.formats import csv_text
from depthscope.app.text.glossary import help_on
from depthscope.app.text.numbers import UNDEFINED
from depthscope.app.text.visible import LONGEST_NAME, visible

PLOTLY_ROUTE = "/depthscope/plotly"
"""Where the server answers with the files of the installed plotly, so that no page asks another machine."""

PLOTLY_SOURCE = f"{PLOTLY_ROUTE}/plotly.min.js"


# A component of our own: st.plotly_chart loses its zoom whenever the data change (`key=` and `uirevision` do not help),
# and reports no click on a cell of a heat map. Styles are not isolated: plotly.js adds its style sheet to the head of
# the document, which does not reach into a shadow root.
def component(name: str, *libraries: str, styles: Sequence[str] = ()) -> Any:
    """A component of the files ``NAME.css`` and ``NAME.js`` of this folder.

    ``libraries``: further files of JavaScript that it uses.
    ``styles``: style sheets in place of its own.
    """
    folder = Path(__file__).parent

    def text(*files: str) -> str:
        return "\n".join((folder / file).read_text(encoding="utf-8") for file in files)

    return st.components.v2.component(
        f"depthscope_{name}",
        css=text(*(f"{each}.css" for each in styles or (name,))),
        js=text(*(f"{each}.js" for each in (*libraries, name))),
        isolate_styles=False,
    )


_plot = component("chart", "plotly_page", "numbers", "back")


def build(kind: FigureKind, analyses: Mapping[str, xr.Dataset], selection: Mapping[str, Any]) -> Figure:
    """Figure of a kind, with those choices of a selection that it uses."""
    return kind.build(analyses, **{name: value for name, value in selection.items() if name in kind.uses})


def card(figure: Figure, *, key: str, height: int = 300, clickable: bool = False) -> None:
    """A figure with its title and the first sentence of its caption; notes and numbers open, the numbers as a CSV file too.

    Which run has which colour is said once, above all figures.

    ``key``: widget key; the zoom lasts as long as it does.
    ``clickable``: whether a click on a cell reruns the page; `clicked_cell` returns it then.
    """
    # The screen shows block means of a large matrix; the table has every cell.
    shown = shrink(figure) if isinstance(figure, Heatmap) else figure
    with st.container(border=True, gap="xsmall"):
        # No columns: in a narrow card one of them would cut the button's word.
        with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
            title = f"**{escaped(shown.title)}**"
            st.markdown(title, width="content", help=help_on(shown.title, _short(shown.caption)))
            offer_numbers(
                "Notes, numbers", lambda: numbers_of(figure), figure.name, key=key, caption=figure.caption
            )
        drawing = to_plotly(shown)
        for trace in drawing.data:
            if isinstance(shown, Lines) and len(shown.runs) > 1 and trace.name in map(words, shown.runs):
                trace.showlegend = False
        show_drawing(
            drawing.to_json(),
            name=shown.name,
            alt=shown.alt,
            key=key,
            height=height,
            clickable=clickable,
            axes=f"{shown.x_label} {shown.y_label} {isinstance(shown, Lines) and (shown.log_x, shown.log_y)}",
        )
        if shown.caption:
            st.caption(escaped(_short(shown.caption)))


def _short(caption: str) -> str:
    """The first sentence, and those that say what is missing or is not as it was measured."""
    first, *others = re.split(r"(?<=[.!?]) (?=[A-Z0-9])", caption)
    return " ".join([first, *(each for each in others if re.search("undefined|gaps|Reduced", each))])


def show_drawing(
    drawing: str, *, name: str, alt: str, key: str, height: int = 300, clickable: bool = False, axes: str = ""
) -> None:
    """A drawing without title, caption and numbers; a zoom is given up where `axes` changes."""
    _plot(
        data={
            "name": name,
            "figure": drawing,
            "alt": visible(alt),
            "height": height,
            "clickable": clickable,
            "key": key,
            "axes": axes,
            "plotly": PLOTLY_SOURCE,
        },
        key=key,
        # An empty callback is how a component declares that it has a trigger of this name.
        on_clicked_change=lambda: None,
    )


def offer_numbers(
    label: str, table: Callable[[], pd.DataFrame], name: str, *, key: str, caption: str = ""
) -> None:
    """A button that opens a table, with its caption and its download."""
    # It reruns the page when it is opened, so that a page with ten closed tables computes and sends none of them.
    opened = st.popover(label, type="tertiary", width="content", key=f"{key}_numbers", on_change="rerun")
    if not opened.open:
        return
    with opened:
        if caption:
            st.caption(escaped(caption))
        numbers = table()
        # All of a large matrix would be hundreds of megabytes in the browser; the file has it all.
        show_frame(numbers, height=320, width=620)
        st.download_button(
            "Download CSV",
            # Computed when it is asked for: a file that is ready for every table of every visitor fills the memory.
            lambda: csv_text(numbers).encode(),
            file_name=f"{name}.csv",
            mime="text/csv",
            key=f"{key}_csv",
            on_click="ignore",  # a rerun would close the popover around it
        )


def clicked_cell(key: str) -> tuple[float, float] | None:
    """Cell of a clickable heat map that was clicked last."""
    state = st.session_state.get(key)
    clicked = state.get("clicked") if state is not None else None
    return (float(clicked["x"]), float(clicked["y"])) if clicked else None


MOST_ROWS, MOST_COLUMNS = 1000, 100
"""Of a table on the page: more than anybody scrolls through. A heuristic of ours."""


def numbers_of(figure: Figure) -> pd.DataFrame:
    """Table of a figure's numbers, as shown and as downloaded: of a heat map every cell, reduced or not."""
    table = figure_table(figure)
    if isinstance(figure, Heatmap):
        # One heading for the column of rows, at the corner of both axes: names of columns are positions.
        corner = f"{figure.y_label} ↓ / {figure.x_label} →"
        return table.rename(columns=lambda x: x if isinstance(x, str) else f"{x:.4g}").rename(
            columns={"y": corner}
        )
    shown = table[["line", "x", "where", "y", "lower", "upper", "role"]]
    return shown.rename(columns={"x": figure.x_label, "y": figure.y_label})


def show_frame(table: pd.DataFrame, **options: Any) -> None:
    """The first rows and columns of a table, and whether there are more."""
    shown = table.iloc[:MOST_ROWS, :MOST_COLUMNS]
    # Four significant digits: a fixed number of decimals would show small numbers as 0.
    plain = {name: st.column_config.NumberColumn(format="%.4g") for name in shown.select_dtypes("float")}
    st.dataframe(shown, hide_index=True, placeholder=UNDEFINED, column_config=plain, **options)
    if shown.shape != table.shape:
        st.caption(
            f"The first {shown.shape[0]} rows and {shown.shape[1]} columns are shown, the file has every number."
        )


MARKS = dict(zip(SHAPES, ("●○", "■□", "▲△", "◆◇", "▼▽", "✚✚", "✖✖", "◀◁", "⬟⬠", "▶▷"), strict=True))
"""Shape of a mark → it and its hollow one as letters."""


def show_legend(colours: Mapping[str, int]) -> None:
    """The colours of some runs or groups of runs, by their numbers in the palette; nothing for a single one."""
    if len(colours) > 1:
        looks = {visible(name, longest=LONGEST_NAME): look_of(colour) for name, colour in colours.items()}
        entries = [
            f'<span><i style="color: {look.colour}">━{MARKS[look.shape][look.hollow]}━</i> {html.escape(name)}</span>'
            for name, look in looks.items()
        ]
        st.html(f'<div class="depthscope-legend">{"".join(entries)}</div>')
