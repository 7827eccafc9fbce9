"""How do runs differ, and is it more than chance? Curves, tests and maps, then the numbers and figures to take away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import build, card, clicked_cell, show_legend
from depthscope.app.dashboard.components.controls import choose, choose_group, choose_one
from depthscope.app.dashboard.components.exports import show_exports
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.components.page import Page, show_facts
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES, FigureKind, Heatmap, Lines, Selection
from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.values import feeds, folded, folded_colours
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.comparison import differences
from depthscope.app.tables.differences import (
    ONE_RUN_EACH,
    between_groups,
    difference_figure,
    difference_map,
    in_words,
)
from depthscope.app.text.terminal import command_line
from depthscope.app.text.visible import visible
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.errors import InputError

FIRST = "effective_rank"
"""The figure that is compared at first, where the runs feed it."""


MAPS = {
    name: kind
    for name, kind in FIGURES.items()
    if isinstance(kind, MatrixFigure) and (kind.rows, kind.columns) == ("depth", "other_depth")
}
"""Figures whose cells are pairs of depths."""


def _show(chosen: ChosenRuns) -> None:
    names = _measures(chosen)
    if not names:
        st.info(
            "None of the chosen runs has a number that is defined: there is nothing to compare.", icon="ℹ️"
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
    along = _is_along_depth(kind)
    selection = choose([kind], chosen.analyses, without=("axis",) if along else ())
    if along:
        selection["axis"] = "relative"
    if "run" in kind.uses:
        selection["run"] = choose_one("Run of the heat map", chosen.feeding(kind.needs), "run", width=260)
    figure = build(kind, chosen.analyses, selection)
    colours = folded_colours(colour_numbers(chosen.analyses), group_of)
    show_legend(colours)
    view = Selection.of({key: value for key, value in selection.items() if key not in ("axis", "run")})
    left, right = st.columns(2, gap="medium") if along else (st.container(), st.container())
    with left:
        card(
            folded(figure, group_of) if isinstance(figure, Lines) else figure,
            key="compare_curves",
            height=340,
        )
    for warning in differences(readings):
        st.caption(f"⚠ {escaped(warning)}")
    if along:
        curves = [each for each in names if _is_along_depth(FIGURES[each])]
        _show_map(readings, curves, CATALOGUE[kind.metric].axis, view, group_of)
    _show_similarity(chosen)
    used = {key: value for key, value in selection.items() if key in kind.uses}
    show_exports(figure, kind, readings, used)
    st.markdown("## About the runs")
    show_facts(readings)
    if not along:
        return
    # Last: a test that was not made yet takes seconds, and what is above can be read meanwhile.
    with right:
        if len(readings) < 2:
            st.info(
                "One run is chosen. Choose a second one at the side: their differences are tested here.",
                icon="ℹ️",
            )
        else:
            _show_differences(readings, kind, view, by, colours)


def _measures(chosen: ChosenRuns) -> list[str]:
    """Figures that a chosen run feeds, curves along depth first: these can be compared."""
    names = [name for name, kind in FIGURES.items() if chosen.feeding(kind.needs)]
    return sorted(names, key=lambda name: not _is_along_depth(FIGURES[name]))


def _is_along_depth(kind: FigureKind) -> bool:
    return isinstance(kind, CurveFigure) and CATALOGUE[kind.metric].axis in ("depth", "connection")


def _show_similarity(chosen: ChosenRuns) -> None:
    """How similar the states of every two depths are, of one run or of two."""
    runs = chosen.feeding(*((name,) for name in MAPS))
    if not runs:
        return
    st.markdown("## Similarity of every two depths")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        names = [name for name in MAPS if any(feeds(chosen.analyses[run], MAPS[name].needs) for run in runs)]
        measure = choose_one("Similarity", names, "similarity", words=_title, width=280)
        first = choose_one("Run of the left map", runs, "similar_a", width=200)
        others = [name for name in runs if name != first]
        second = choose_one("Run of the right map", others, "similar_b", width=200) if others else None
    drawn = [_map_of(chosen, run, measure) for run in (first, second) if run is not None]
    figures = {
        f"similarity_{side}": each for side, each in zip("ab", drawn, strict=False) if each is not None
    }
    for column, (key, figure) in zip(st.columns(2), figures.items(), strict=False):
        with column:
            card(replace(figure, name=key), key=key, height=400)


def _title(name: str) -> str:
    return MAPS[name].title.replace(" of every two depths", "").replace(" between every two depths", "")


def _map_of(chosen: ChosenRuns, run: str, measure: str) -> Heatmap | None:
    """The map of a run by a measure; None, and why, where the run does not have it."""
    data = chosen.analyses[run]
    try:
        figure = MAPS[measure].build(chosen.analyses, run=run)
    except ValueError:
        reason = data.attrs.get("not_computed", {}).get(measure, "it was not measured")
        st.info(escaped(f"{run} has no {_title(measure)}: {reason}."), icon="ℹ️")
        return None
    return figure if isinstance(figure, Heatmap) else None


def _show_map(
    readings: Sequence[Reading], names: Sequence[str], axis: str, view: Selection, group_of: Mapping[str, str]
) -> None:
    """The map of the relative differences of two runs or groups; a click on a cell opens its measure."""
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
    st.caption("Click a cell to open its measure.")
    figure_of = {FIGURES[name].metric: name for name in reversed(names)}
    st.session_state["compare_rows"] = [figure_of[metric] for metric in rows]


def _open_clicked() -> None:
    """Choose the measure of the cell that was clicked; the state of a field is set before it is drawn."""
    cell, rows = clicked_cell("compare_map"), st.session_state.get("compare_rows")
    if cell is not None and rows:
        st.session_state["measure_of"] = rows[int(np.clip(round(cell[1]), 0, len(rows) - 1))]


def _show_differences(
    readings: Sequence[Reading], kind: FigureKind, view: Selection, by: str | None, colours: Mapping[str, int]
) -> None:
    try:
        with st.spinner(f"Testing {CATALOGUE[kind.metric].label}, sequence by sequence …"):
            if by is not None:
                found = between_groups(readings, [kind.metric], view, by=by)
            else:
                found = run_library.differences_between(readings, kind.metric, view)
    except (ValueError, OSError) as error:
        st.info(f"The differences cannot be tested: {escaped(error)}", icon="ℹ️")
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
    for each in found:
        st.markdown(f"- {escaped(in_words(each))}")
    if by is None:
        st.caption(f"{ONE_RUN_EACH}.")
    paths = [Path(path) for path in dict.fromkeys(reading.path for reading in readings)]
    extra = ["--by", by] if by else []
    command = command_line("compare", *paths, "--metrics", kind.metric, *extra)
    st.code(visible(command), "bash", wrap_lines=True)


PAGE = Page(
    title="Compare and export",
    url_path="compare",
    help="How do the chosen runs differ at the same relative depth, is it more than chance, and how does it get into a paper?",
    show=_show,
)
