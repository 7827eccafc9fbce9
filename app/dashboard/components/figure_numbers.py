"""Which numbers does a figure show? Its table under the names of its axes, and how a page shows a table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st
from pandas.io.formats.style import Styler

from depthscope.app.figures import Figure, Heatmap
from depthscope.app.figures.numbers import figure_table
from depthscope.app.figures.palette import Look, look_of
from depthscope.app.tables.formats import csv_text
from depthscope.app.text.numbers import UNDEFINED, number
from depthscope.app.text.visible import LONGEST_NAME, visible

__all__ = ["cut_words", "numbers_of", "offer_csv", "show_frame", "show_legend"]

MOST_CELLS, MOST_ROWS, MOST_COLUMNS = 20_000, 1000, 100
"""Of a table on the page: more than anybody scrolls through. A heuristic of ours."""


def numbers_of(figure: Figure) -> pd.DataFrame:
    """Table of a figure's numbers, as shown and as downloaded.

    ``figure``: any figure; a heat map gives every cell, reduced or not.
    """
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
    """The first rows and columns of a table, its numbers as everywhere on the pages; they are sorted as numbers.

    ``table``: without two columns of one name.
    ``options``: of `st.dataframe`.
    """
    st.dataframe(_spelled(table), hide_index=True, placeholder=UNDEFINED, **options)


def offer_csv(table: pd.DataFrame, name: str, *, key: str, label: str = "Download CSV") -> None:
    """A button that saves a table.

    ``name``: of the file, without its ending.
    """
    st.download_button(
        label,
        # Computed when it is asked for: a file that is ready for every table of every visitor fills the memory.
        lambda: csv_text(table).encode(),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=key,
        on_click="ignore",  # a rerun would close the popover around it
    )


def _spelled(table: pd.DataFrame) -> Styler:
    rows, columns = _shown_size(table)
    shown = table.iloc[:rows, :columns]
    numbers = [name for name in shown if pd.api.types.is_float_dtype(shown[name])]
    # Such as depths, of which some file may lack one.
    counts = [name for name in numbers if (shown[name].dropna() % 1 == 0).all()]
    spell: Any = number
    return shown.style.format(spell, subset=numbers).format("{:.0f}", subset=counts, na_rep=UNDEFINED)


def cut_words(table: pd.DataFrame) -> str:
    """What of a table is not shown; empty where all of it is."""
    rows, columns = _shown_size(table)
    if table.shape[0] <= rows and table.shape[1] <= columns:
        return ""
    return f"the first {rows} rows and {min(columns, table.shape[1])} columns are shown, the file has every number"


def _shown_size(table: pd.DataFrame) -> tuple[int, int]:
    columns = min(table.shape[1], MOST_COLUMNS)
    return min(MOST_ROWS, MOST_CELLS // max(columns, 1)), MOST_COLUMNS


OUTLINES = {
    "triangle-up": "50% 0, 100% 100%, 0 100%",
    "triangle-down": "0 0, 100% 0, 50% 100%",
    "triangle-left": "100% 0, 100% 100%, 0 50%",
    "triangle-right": "0 0, 100% 50%, 0 100%",
    "diamond": "50% 0, 100% 50%, 50% 100%, 0 50%",
    "pentagon": "50% 0, 100% 40%, 80% 100%, 20% 100%, 0 40%",
    "cross": "35% 0, 65% 0, 65% 35%, 100% 35%, 100% 65%, 65% 65%, 65% 100%, 35% 100%, 35% 65%, 0 65%, 0 35%, 35% 35%",
    "x": "20% 0, 50% 30%, 80% 0, 100% 20%, 70% 50%, 100% 80%, 80% 100%, 50% 70%, 20% 100%, 0 80%, 30% 50%, 0 20%",
}
"""Shape of a mark → its corners; a circle and a square have none."""


def show_legend(colours: Mapping[str, int]) -> None:
    """The colours of some runs or groups of runs, by their numbers in the palette; nothing for a single one."""
    if len(colours) > 1:
        entries = [_entry(name, look_of(colour)) for name, colour in colours.items()]
        st.html(f'<div class="depthscope-legend">{"".join(entries)}</div>')


def _entry(name: str, look: Look) -> str:
    fill = f"border: 2px solid {look.colour}" if look.hollow else f"background: {look.colour}"
    shape = f"clip-path: polygon({OUTLINES[look.shape]})" if look.shape in OUTLINES else ""
    rounded = "border-radius: 50%" if look.shape == "circle" else ""
    return (
        f'<span><i class="line" style="background: {look.colour}"></i>'
        f'<i class="mark" style="{fill}; {shape}; {rounded}"></i>{html.escape(visible(name, longest=LONGEST_NAME))}</span>'
    )
