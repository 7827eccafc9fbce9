"""How alike are the states of two depths? A heat map of every two; a click opens the pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.chart import build, card, clicked_cell
from depthscope.app.dashboard.components.controls import choose, chosen_run
from depthscope.app.dashboard.components.figure_grid import show_in_rows, show_question, tell_on_request
from depthscope.app.dashboard.components.markdown import plain
from depthscope.app.dashboard.components.page_style import heading
from depthscope.app.dashboard.state.chosen_runs import Desk, desk, explain_missing
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.figures.build.values import feeds, names_of, pick
from depthscope.app.figures.catalogue.similarity import build_cut
from depthscope.app.text.numbers import number, quantity

_MAPS = ("cka", "angular_distance")


def show() -> None:
    """The page."""
    heading(
        "Similarity", "How alike are the states of every two depths, and does each block change its input?"
    )
    found = desk()
    show_question(found, "similarity")
    kinds = found.kinds("similarity")
    if not kinds:
        explain_missing("similarity", "None of the chosen runs holds states to compare.", "depthscope demo")
        return
    selection = choose(kinds.values(), found.analyses)
    able = [name for name, data in found.analyses.items() if any(feeds(data, (m,)) for m in _MAPS)]
    if able:
        selection = _maps(found, able, selection)
    show_in_rows([kind for name, kind in kinds.items() if name not in _MAPS], found, selection)
    tell_on_request(found, "similarity")


def _maps(found: Desk, able: list[str], selection: dict[str, Any]) -> dict[str, Any]:
    """Both heat maps and the pair of depths that is open; the selection with the run that they show."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        run = chosen_run(able)
        selection = selection | {"run": run}
        data = found.analyses[run]
        last = data.sizes["depth"] - 1
        _follow_click(last, selection)
        a = _depth("a", "Depth a", last, 0)
        b = _depth("b", "Depth b", last, last)
        st.caption("Click a cell of a heat map, or type two depths, to open the pair.", width="content")
    scale = last if selection.get("axis") == "relative" and last else 1
    ring = (b / scale, a / scale)
    for column, name in zip(st.columns(2), _MAPS, strict=True):
        with column:
            if feeds(data, (name,)):
                figure = build(FIGURES[name], found.analyses, selection)
                card(figure, key=f"chart_{name}", height=430, clickable=True, mark=ring)
    _pair(data, a, b, found, selection)
    return selection


def _follow_click(last: int, selection: dict[str, Any]) -> None:
    """A clicked cell moves the two depth fields, which hold the pair and keep it in the URL."""
    for name in _MAPS:
        cell = clicked_cell(f"chart_{name}")
        if cell is None:
            continue
        scale = last if selection.get("axis") == "relative" else 1
        x, y = (int(np.clip(round(value * scale), 0, last)) for value in cell)
        st.session_state["a"], st.session_state["b"] = y, x


def _depth(key: str, label: str, last: int, default: int) -> int:
    if st.session_state.get(key, default) > last:
        st.session_state[key] = last
    return int(st.number_input(label, 0, last, default, key=key, bind="query-params", width=130))


def _pair(data: xr.Dataset, a: int, b: int, found: Desk, selection: dict[str, Any]) -> None:
    """What is known about two depths."""
    names = (
        names_of(data["cka"], "depth")
        if "cka" in data
        else [f"depth {i}" for i in range(data.sizes["depth"])]
    )
    left, right = st.columns([2, 3])
    with left, st.container(border=True):
        st.markdown(f"##### Depth {a} against depth {b}")
        st.caption(plain(f"{names[a]} against {names[b]}, run {selection['run']}"))
        st.table(_pair_table(data, a, b, selection).set_index("measure"), border="horizontal")
        st.caption("Noise: what independent noise of the same shape would give.")
    with right:
        if feeds(data, ("cka",)):
            chosen = {name: selection[name] for name in ("estimator", "tokens", "run") if name in selection}
            card(build_cut(found.analyses, depths=(a, b), **chosen), key="chart_cka_cut", height=260)


def _pair_table(data: xr.Dataset, a: int, b: int, selection: dict[str, Any]) -> pd.DataFrame:
    """Similarities of one pair, with what independent noise would give."""
    tokens = selection.get("tokens", "all")
    rows = []
    for estimator in ("unbiased", "biased"):
        choice = Selection(estimator=estimator, tokens=tokens)
        matrix, null = pick(data, "cka", choice), pick(data, "cka_null", choice)
        if matrix is not None:
            expected = float("nan") if null is None else float(null)
            rows.append(
                (
                    f"linear CKA, {estimator}",
                    number(float(matrix.isel(depth=a, other_depth=b))),
                    number(expected),
                )
            )
    streamed, error = (pick(data, name, Selection()) for name in ("streamed_cka", "streamed_cka_error"))
    if streamed is not None and error is not None:
        value, spread = (float(matrix.isel(depth=a, other_depth=b)) for matrix in (streamed, error))
        rows.append(("linear CKA, every token", quantity(value, spread), number(0.0)))
    angle = pick(data, "angular_distance", Selection(tokens=tokens))
    if angle is not None:
        rows.append(("angular distance / π", number(float(angle.isel(depth=a, other_depth=b))), number(0.5)))
    return pd.DataFrame(rows, columns=["measure", "value", "noise"])


show()
