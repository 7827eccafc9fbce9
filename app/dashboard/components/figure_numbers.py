"""Which numbers does a figure show? Its table under the names of its axes, and how a page shows a table."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st
from pandas.io.formats.style import Styler

from depthscope.app.figures import Figure, Heatmap
from depthscope.app.figures.numbers import figure_table
from depthscope.app.tables.formats import csv_text
from depthscope.app.text.numbers import UNDEFINED, number

__all__ = ["cut_words", "numbers_of", "offer_csv", "show_frame"]

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
