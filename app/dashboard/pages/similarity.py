"""How similar are the states of two depths? A heat map of every two; a click opens the pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr
from streamlit.delta_generator import DeltaGenerator

from depthscope.app.dashboard.components.chart import card, clicked_cell
from depthscope.app.dashboard.components.choices import choose_index, choose_one
from depthscope.app.dashboard.components.controls import choose, choose_section
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.on_request import offer_metrics
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import show_in_rows, show_on_request
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES, Analyses, Heatmap, Selection
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.values import feeds, names_of, pick
from depthscope.app.figures.catalogue.similarity import build_cut
from depthscope.app.figures.specification import NOISE_BASELINE
from depthscope.app.readings.readings import Reading
from depthscope.app.text.numbers import number

MEASURES = {
    name: kind
    for name, kind in FIGURES.items()
    if isinstance(kind, MatrixFigure) and (kind.rows, kind.columns) == ("depth", "other_depth")
}
"""Figures whose cells are pairs of depths; a click on one opens the pair."""

SIDES = ("left", "right")


MAPS, CURVES = "Maps of every two depths", "Curves along depth"


def _show(chosen: ChosenRuns) -> None:
    figures = chosen.figures("similarity")
    curves = [kind for name, kind in figures.items() if name not in MEASURES]
    part = choose_section([MAPS, CURVES]) if len(curves) < len(figures) else CURVES
    selection = choose(
        [kind for kind in figures.values() if (kind in curves) == (part == CURVES)], chosen.analyses
    )
    if part == CURVES:
        show_in_rows(curves, chosen, selection)
        show_on_request(chosen, "similarity")
        return
    runs = chosen.feeding(*((name,) for name in MEASURES))
    if runs:
        maps = _choose_maps(runs)
        data = chosen.analyses[maps[0][0]]
        with st.container(horizontal=True, vertical_alignment="bottom"):
            pair = _choose_pair(data, selection)
            st.caption("Click a cell of a heat map, or type two depths, to open the pair.", width="content")
        # Drawn after the fields: the ring around the open pair has to be where they are now.
        difference = _show_maps(chosen, selection, maps, pair)
        selection["run"] = maps[0][0]
        if difference is None:
            _show_pair(chosen, selection, pair, *st.columns([2, 3]))
        else:
            left, right = st.columns(2)
            with left:
                card(difference, key="chart_difference", height=430)
            _show_pair(chosen, selection, pair, right, right)


def _choose_maps(runs: Sequence[str]) -> list[tuple[str, str]]:
    """Run and measure of the map on the left and of that on the right."""
    left, right = st.columns(2)
    with left, st.container(horizontal=True, vertical_alignment="bottom"):
        run = choose_one("Run of the left map", runs, "run", width=200)
        measure = choose_one("Measure of the left map", list(MEASURES), "measure_a", words=_title, width=280)
    # At first two runs by the same measure, or of one run two measures.
    other = next((name for name in runs if name != run), run)
    second = measure if other != run else next(name for name in MEASURES if name != measure)
    with right, st.container(horizontal=True, vertical_alignment="bottom"):
        other = choose_one("Run of the right map", runs, "run_b", default=other, width=200)
        second = choose_one(
            "Measure of the right map", list(MEASURES), "measure_b", default=second, words=_title, width=280
        )
    return [(run, measure), (other, second)]


def _title(name: str) -> str:
    return MEASURES[name].title.replace(" of every two depths", "").replace(" between every two depths", "")


def _axis_scale(data: xr.Dataset, selection: dict[str, Any]) -> int:
    """How many depths one unit of the heat maps' axes is: the axes show a depth's index or its share of the depth."""
    last = data.sizes["depth"] - 1
    return last if selection.get("axis") == "relative" and last else 1


def _choose_pair(data: xr.Dataset, selection: dict[str, Any]) -> tuple[int, int]:
    """Two depths, from a click or from the fields that put them into the URL as `?a=` and `?b=`."""
    last = data.sizes["depth"] - 1
    # The state of a field may be set only before the field is drawn.
    for side in SIDES:
        cell = clicked_cell(f"chart_{side}")
        if cell is not None:
            scale = _axis_scale(data, selection)
            # A click may come from a heat map that was drawn for a deeper run.
            column, row = (int(np.clip(round(position * scale), 0, last)) for position in cell)
            st.session_state["a"], st.session_state["b"] = row, column
    return choose_index("Depth a", last, "a", default=0), choose_index("Depth b", last, "b", default=last)


def _show_maps(
    chosen: ChosenRuns, selection: dict[str, Any], maps: Sequence[tuple[str, str]], pair: tuple[int, int]
) -> Heatmap | None:
    """The two maps; where they are of two runs by one measure, returns their difference."""
    drawn: list[Heatmap] = []
    for column, side, (run, measure) in zip(st.columns(2), SIDES, maps, strict=True):
        with column:
            figure = _map_of(chosen.analyses, run, measure, selection)
            if figure is None:
                _explain_missing(chosen.readings[run], measure, side)
                continue
            # Horizontal first: b is the column of the cell and a its row.
            scale = _axis_scale(chosen.analyses[run], selection)
            if drawn and figure.name == drawn[0].name:
                figure = replace(figure, name=f"{figure.name}_{side}")
            drawn.append(figure)
            card(
                figure,
                key=f"chart_{side}",
                height=430,
                clickable=True,
                mark=(pair[1] / scale, pair[0] / scale),
            )
    if len(drawn) == 2 and maps[0][1] == maps[1][1] and maps[0][0] != maps[1][0]:
        return map_difference(*drawn)
    return None


def _map_of(analyses: Analyses, run: str, measure: str, selection: dict[str, Any]) -> Heatmap | None:
    """The map of a run by a measure; None where the run does not have it in this version."""
    kind = MEASURES[measure]
    choices = {name: value for name, value in selection.items() if name in kind.uses} | {"run": run}
    try:
        figure = kind.build(analyses, **choices)
    except ValueError:
        return None
    return figure if isinstance(figure, Heatmap) else None


def _explain_missing(reading: Reading, measure: str, side: str) -> None:
    """Why a run has no map of a measure, and how to get one."""
    data = reading.analysis
    if measure in data.attrs.get("on_request", ()):
        offer_metrics([reading], [measure], key=f"request_{side}")
        return
    reason = data.attrs.get("not_computed", {}).get(measure)
    if measure in data:
        words = "has this measure in another version only: choose other tokens or another estimator"
    else:
        words = f"has no such measure: {reason}" if reason else "has no such measure"
    st.info(escaped(f"{reading.name} {words}."), icon="ℹ️")
    if measure not in data:
        st.code(f"depthscope analyze RUN.zarr --metrics {measure}", "bash")


def map_difference(left: Heatmap, right: Heatmap) -> Heatmap:
    """One map less another one, at the depths of the shallower run and the nearest relative depths of the other.

    ``left, right``: of the same measure, of two runs.
    """
    shallow = left if len(left.x) <= len(right.x) else right
    size = len(shallow.x)

    def at_shared_depths(z: np.ndarray) -> np.ndarray:
        # Between two measured depths there is no state: the nearest one, and no interpolation.
        nearest = np.round(np.linspace(0, len(z) - 1, size)).astype(int)
        return z[np.ix_(nearest, nearest)]

    z = at_shared_depths(left.z) - at_shared_depths(right.z)
    known = z[np.isfinite(z)]
    reach = float(np.abs(known).max()) if known.size else 0.0
    place = np.unravel_index(int(np.nanargmax(np.abs(z))), z.shape) if known.size else (0, 0)
    words = (
        f"{left.run} minus {right.run}; the largest difference is {number(float(z[place]))}, between depths {place[0]} and "
        f"{place[1]} of {shallow.run}."
        if known.size
        else f"{left.run} minus {right.run}: undefined everywhere."
    )
    nearest = "" if len(left.x) == len(right.x) else " Runs of unequal depth: at the nearest relative depths."
    return replace(
        shallow,
        name=f"{left.name}_difference",
        title=f"Difference: {left.run} − {right.run}",
        z=z,
        z_label="difference",
        limits=(-reach, reach) if reach > 0 else None,
        diverging=True,
        log_z=False,
        caption=words + nearest,
        alt=words + nearest,
        run="",
    )


def _show_pair(
    chosen: ChosenRuns,
    selection: dict[str, Any],
    pair: tuple[int, int],
    left: DeltaGenerator,
    right: DeltaGenerator,
) -> None:
    """The numbers of the open pair on the left, and on the right how similarity falls off around its depths."""
    a, b = pair
    data = chosen.analyses[selection["run"]]
    numbered = [f"depth {depth}" for depth in range(data.sizes["depth"])]
    names = names_of(data["cka"], "depth") if "cka" in data else numbered
    with left, st.container(border=True):
        st.markdown(f"## Depth {a} against depth {b}")
        st.caption(escaped(f"{names[a]} against {names[b]}, run {selection['run']}"))
        table = _pair_table(data, pair, selection.get("tokens", "all"))
        st.table(table.set_index("measure"), border="horizontal")
        st.caption(f"{NOISE_BASELINE.capitalize()}: what independent noise of the same shape would give.")
    with right:
        if feeds(data, ("cka",)):
            # The fields that the two rows depend on; `run` would otherwise be the first one.
            used = {name: selection[name] for name in ("estimator", "tokens", "run") if name in selection}
            card(build_cut(chosen.analyses, depths=pair, **used), key="chart_cka_cut", height=260)


def _pair_table(data: xr.Dataset, pair: tuple[int, int], tokens: str) -> pd.DataFrame:
    """Similarities of one pair of depths, with what independent noise would give."""
    at = {"depth": pair[0], "other_depth": pair[1]}
    rows = []
    for estimator in ("unbiased", "biased"):
        selection = Selection(estimator=estimator, tokens=tokens)
        matrix, null = pick(data, "cka", selection), pick(data, "cka_null", selection)
        if matrix is not None:
            noise = float("nan") if null is None else float(null)
            rows.append((f"linear CKA, {estimator}", number(float(matrix.isel(at))), number(noise)))
    angle = pick(data, "angular_distance", Selection(tokens=tokens))
    if angle is not None:
        # Independent directions are orthogonal on average: an angle of π/2.
        rows.append(("angular distance / π", number(float(angle.isel(at))), number(0.5)))
    return pd.DataFrame(rows, columns=["measure", "value", NOISE_BASELINE])


PAGE = Page(
    title="Similarity",
    url_path="similarity",
    help="How similar are the states of every two depths, and does each block change its input?",
    question="similarity",
    missing="None of the chosen runs has states to compare.",
    show=_show,
)
