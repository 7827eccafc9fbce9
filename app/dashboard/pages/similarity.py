"""How alike are the states of two depths? A heat map of every two; a click opens the pair."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.chart import build, card, clicked_cell
from depthscope.app.dashboard.components.controls import choose, chosen_run
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import show_in_rows, show_on_request
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.figures.build.values import feeds, names_of, pick
from depthscope.app.figures.catalogue.similarity import build_cut
from depthscope.app.text.numbers import number, quantity

HEAT_MAPS = ("cka", "angular_distance")
"""Figures whose cells are pairs of depths; a click on one opens the pair."""


def _show(chosen: ChosenRuns) -> None:
    figures = chosen.figures("similarity")
    selection = choose(figures.values(), chosen.analyses)
    runs = chosen.feeding(*((name,) for name in HEAT_MAPS))
    if runs:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            selection["run"] = chosen_run(runs)
            pair = _choose_pair(chosen.analyses[selection["run"]], selection)
            st.caption("Click a cell of a heat map, or type two depths, to open the pair.", width="content")
        # Drawn after the fields: the ring around the open pair has to be where they are now.
        _show_heat_maps(chosen, selection, pair)
        _show_pair(chosen, selection, pair)
    show_in_rows([kind for name, kind in figures.items() if name not in HEAT_MAPS], chosen, selection)
    show_on_request(chosen, "similarity")


def _axis_scale(data: xr.Dataset, selection: dict[str, Any]) -> int:
    """How many depths one unit of the heat maps' axes is: the axes show a depth's index or its share of the depth."""
    last = data.sizes["depth"] - 1
    return last if selection.get("axis") == "relative" and last else 1


def _choose_pair(data: xr.Dataset, selection: dict[str, Any]) -> tuple[int, int]:
    """Two depths, from a click or from the fields that put them into the URL as `?a=` and `?b=`."""
    last = data.sizes["depth"] - 1
    # The state of a field may be set only before the field is drawn.
    for name in HEAT_MAPS:
        cell = clicked_cell(f"chart_{name}")
        if cell is not None:
            scale = _axis_scale(data, selection)
            # A click may come from a heat map that was drawn for a deeper run.
            column, row = (int(np.clip(round(position * scale), 0, last)) for position in cell)
            st.session_state["a"], st.session_state["b"] = row, column
    pair = []
    for key, default in (("a", 0), ("b", last)):
        # Streamlit fails on an address with ?a=inf: the field then does not read the address, and its value leaves it.
        bound = re.fullmatch(r"\d{1,9}", st.query_params.get(key, "0")) is not None
        if not bound:
            del st.query_params[key]
        # A depth of a deeper run, or of a link to one: Streamlit raises for a value above the maximum.
        if st.session_state.get(key, default) > last:
            st.session_state[key] = last
        bind = "query-params" if bound else None
        pair.append(int(st.number_input(f"Depth {key}", 0, last, default, key=key, bind=bind, width=130)))
    return pair[0], pair[1]


def _show_heat_maps(chosen: ChosenRuns, selection: dict[str, Any], pair: tuple[int, int]) -> None:
    data = chosen.analyses[selection["run"]]
    scale = _axis_scale(data, selection)
    for column, name in zip(st.columns(2), HEAT_MAPS, strict=True):
        with column:
            if feeds(data, (name,)):
                figure = build(FIGURES[name], chosen.analyses, selection)
                # Horizontal first: b is the column of the cell and a its row.
                ring = (pair[1] / scale, pair[0] / scale)
                card(figure, key=f"chart_{name}", height=430, clickable=True, mark=ring)


def _show_pair(chosen: ChosenRuns, selection: dict[str, Any], pair: tuple[int, int]) -> None:
    """The numbers of the open pair, and how similarity falls off around its depths."""
    a, b = pair
    data = chosen.analyses[selection["run"]]
    numbered = [f"depth {depth}" for depth in range(data.sizes["depth"])]
    names = names_of(data["cka"], "depth") if "cka" in data else numbered
    left, right = st.columns([2, 3])
    with left, st.container(border=True):
        st.markdown(f"##### Depth {a} against depth {b}")
        st.caption(escaped(f"{names[a]} against {names[b]}, run {selection['run']}"))
        table = _pair_table(data, pair, selection.get("tokens", "all"))
        st.table(table.set_index("measure"), border="horizontal")
        st.caption("Noise: what independent noise of the same shape would give.")
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
    streamed = pick(data, "streamed_cka", Selection())
    error = pick(data, "streamed_cka_error", Selection())
    if streamed is not None and error is not None:
        value = quantity(float(streamed.isel(at)), float(error.isel(at)))
        # Sums over every token are unbiased, so that noise gives 0 however few the tokens are.
        rows.append(("linear CKA, every token", value, number(0.0)))
    angle = pick(data, "angular_distance", Selection(tokens=tokens))
    if angle is not None:
        # Independent directions are orthogonal on average: an angle of π/2.
        rows.append(("angular distance / π", number(float(angle.isel(at))), number(0.5)))
    return pd.DataFrame(rows, columns=["measure", "value", "noise"])


PAGE = Page(
    title="Similarity",
    url_path="similarity",
    help="How alike are the states of every two depths, and does each block change its input?",
    question="similarity",
    missing="None of the chosen runs has states to compare.",
    show=_show,
)
