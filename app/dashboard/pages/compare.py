"""How do runs differ, and is it more than chance? Curves at the same relative depth, and tests of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import card, clicked_cell
from depthscope.app.dashboard.components.choices import choose_index, choose_one
from depthscope.app.dashboard.components.controls import choose
from depthscope.app.dashboard.components.legend import show_legend
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.run_groups import choose_group
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.run_differences import differences_between
from depthscope.app.figures import FIGURES, FigureKind, Lines, Selection
from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.folded_runs import folded, folded_colours
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.comparison import comparison_table, differences
from depthscope.app.tables.difference_map import difference_map
from depthscope.app.tables.differences import (
    ONE_RUN_EACH,
    between_groups,
    clearest,
    difference_figure,
    differences_at,
    in_words,
)
from depthscope.app.text.terminal import command_line
from depthscope.app.text.visible import visible
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.analysis.differences import Difference
from depthscope.diagnostics.errors import InputError

FIRST = "effective_rank"
"""The figure that is compared at first, where the runs feed it."""


FEW_RUNS = 3
"""Runs whose table has room in half of the page."""


def comparable(chosen: ChosenRuns) -> list[str]:
    """Figures of one number along depth or connections that a chosen run feeds."""
    return [
        name
        for name, kind in FIGURES.items()
        if isinstance(kind, CurveFigure)
        and CATALOGUE[kind.metric].axis in ("depth", "connection")
        and chosen.feeding(kind.needs)
    ]


def _show(chosen: ChosenRuns) -> None:
    names = comparable(chosen)
    if not names:
        st.info(
            "None of the chosen runs has a number along its depth: there is nothing to compare.", icon="ℹ️"
        )
        return
    readings = list(chosen.readings.values())
    _open_clicked()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = choose_one(
            "Measure", names, "measure_of", default=FIRST, words=lambda each: FIGURES[each].title, width=340
        )
        by, group_of = choose_group(readings, "Compare", "compare_by")
    kind = FIGURES[name]
    selection = {**choose([kind], chosen.analyses, without=("axis",)), "axis": "relative"}
    curves = kind.build(chosen.analyses, **{key: selection[key] for key in selection if key in kind.uses})
    assert isinstance(curves, Lines)
    colours = folded_colours(colour_numbers(chosen.analyses), group_of)
    show_legend(colours)
    view = Selection.of({key: value for key, value in selection.items() if key != "axis"})
    left, right = st.columns(2, gap="medium")
    with left:
        card(folded(curves, group_of), key="compare_curves", height=340)
        if len(readings) <= FEW_RUNS:  # next to the tests, which are as long
            _show_table(readings, kind, view)
    for warning in differences(readings):
        st.caption(f"⚠ {escaped(warning)}")
    _show_map(readings, names, CATALOGUE[kind.metric].axis, view, group_of)
    if len(readings) > FEW_RUNS:
        _show_table(readings, kind, view)
    # Last: a test that was not made yet takes seconds, and what is above can be read meanwhile.
    with right:
        if len(readings) < 2:
            st.info(
                "One run is chosen. Choose a second one at the side: their differences are tested here.",
                icon="👈",
            )
        else:
            _show_differences(readings, kind, view, by, colours)


def _show_map(
    readings: Sequence[Reading],
    names: Sequence[str],
    axis: str,
    view: Selection,
    group_of: Mapping[str, str],
) -> None:
    """The map of the relative differences of two runs or groups; a click on a cell opens its measure there."""
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(group_of.get(reading.name, reading.name), []).append(reading)
    if len(groups) < 2:
        return
    first, second = list(groups)[:2]
    if len(groups) > 2:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            second = choose_one("Map of", list(groups), "map_of", default=second, width=200)
            others = [name for name in groups if name != second]
            first = choose_one("minus", others, "map_less", default=first, width=200)
    pair = {name: groups[name] for name in (first, second)}
    try:
        figure, rows = difference_map(pair, [FIGURES[name].metric for name in names], view, axis=axis)
    except InputError as error:
        st.info(escaped(str(error)), icon="ℹ️")
        return
    card(figure, key="compare_map", height=110 + 17 * len(rows), clickable=True)
    st.caption("Click a cell to open its measure at that place.")
    figure_of = {FIGURES[name].metric: name for name in reversed(names)}
    st.session_state["compare_rows"] = [figure_of[metric] for metric in rows]


def _open_clicked() -> None:
    """Choose the measure and the place of the cell that was clicked; the state of a field is set before it is drawn."""
    cell, rows = clicked_cell("compare_map"), st.session_state.get("compare_rows")
    if cell is not None and rows:
        st.session_state["measure_of"] = rows[int(np.clip(round(cell[1]), 0, len(rows) - 1))]
        st.session_state["compare_at"] = max(round(cell[0]), 0)


def _differences(
    readings: Sequence[Reading], kind: FigureKind, view: Selection, by: str | None
) -> list[Difference] | None:
    """The tested differences; None where they cannot be tested."""
    place = st.empty()

    def progress(*done: Any) -> None:
        place.info(f"Testing {CATALOGUE[kind.metric].label}, sequence by sequence …", icon="⏳")

    try:
        if by is not None:
            return between_groups(readings, [kind.metric], view, by=by)
        found = differences_between(readings, kind.metric, view, progress=progress)
        place.empty()
        return found
    except (ValueError, OSError) as error:
        place.info(f"The differences cannot be tested: {escaped(error)}", icon="ℹ️")
        return None


def _show_differences(
    readings: Sequence[Reading], kind: FigureKind, view: Selection, by: str | None, colours: Mapping[str, int]
) -> None:
    found = _differences(readings, kind, view, by)
    if found is None:
        return
    if not found:
        st.info(
            "No difference can be tested for this measure: it is not a mean over sequences, or the runs have no states of "
            "single sequences.",
            icon="ℹ️",
        )
        return
    figure = difference_figure(found, kind.title, colours)
    card(figure, key="compare_differences", height=340)
    axis = str(found[0].value.dims[0])
    last = max(each.value.size for each in found) - 1
    at = choose_index(
        f"At {axis} of the shallower run", last, "compare_at", default=clearest(found), width=220
    )
    shown = differences_at(found, at).map(escaped).rename(columns=escaped)
    st.table(shown.set_index("difference"), border="horizontal")
    for each in found:
        st.markdown(f"- {escaped(in_words(each))}")
    if by is None:
        st.caption(f"{ONE_RUN_EACH}.")
    paths = [Path(path) for path in dict.fromkeys(reading.path for reading in readings)]
    extra = ["--by", by] if by else []
    command = command_line("compare", *paths, "--metrics", kind.metric, *extra)
    st.code(visible(command), "bash", wrap_lines=True)


def _show_table(readings: Sequence[Reading], kind: FigureKind, view: Selection) -> None:
    try:
        table = comparison_table(readings, [kind.metric], view)
    except ValueError:  # no run has it in this version, and the curves above say so
        return
    with st.container(border=True):
        st.markdown("## Side by side at the same relative depth")
        printed = table.printed.rename(columns=lambda name: escaped(name)).map(escaped)
        st.table(printed.set_index(printed.columns[1]).drop(columns=printed.columns[0]), border="horizontal")
        st.caption(escaped(table.caption))


PAGE = Page(
    title="Compare",
    url_path="compare",
    help="How do the chosen runs differ at the same relative depth, and is it more than chance?",
    show=_show,
)
