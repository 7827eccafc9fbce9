"""What is there to know about one depth? Its findings, numbers, tokens and matrices, for all depths at once.

The browser shows them under the cursor; the server is asked for spectra only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import card, component
from depthscope.app.dashboard.components.finding_card import BADGES
from depthscope.app.dashboard.components.microscope import View, depth_names, remembered
from depthscope.app.figures import FIGURES, Selection
from depthscope.app.figures.build.values import pick
from depthscope.app.readings.close_up import CloseUp, Matrix
from depthscope.app.readings.depth_map import range_of
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.findings import cards_of
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import visible
from depthscope.diagnostics import CATALOGUE

NUMBERS = (
    *("effective_rank", "participation_ratio", "token_cosine", "dong_residual", "adjacent_cka"),
    *("adjacent_angle", "branch_share", "massive_activation", "residual_norm", "gradient_norm"),
    *("backward_gain", "stream_cosine", "sink_mass"),
)
"""Metrics of the table of numbers, in its order."""

MOST_CARDS = 3
"""Findings of a depth."""

_pane = component("pane", "numbers", "matrices", styles=("matrices",))
_bench = component("bench", "numbers", "matrices", styles=("matrices",))


def show_depth(reading: Reading, close_up: CloseUp | None, view: View, *, on_token: Any) -> None:
    """All about the depth under the cursor or that is pinned, and below it what only the server can tell of the pinned one."""
    choice = (view.stream, view.whose, view.token)
    facts = remembered(
        "microscope_facts", (reading, close_up), choice, lambda: _facts(reading, close_up, view)
    )
    _pane(
        data={"name": "microscope", "what": "pane", **facts, "token": view.token, "pin": view.pin},
        key="microscope_pane",
        on_token_change=on_token,
    )
    if close_up is None:
        st.caption("The run has no states of single tokens, or its file has changed: reload this page.")
    if "singular_value" in reading.analysis:
        figure = FIGURES["spectrum"].build({reading.name: reading.analysis}, depths=(view.pin,))
        card(figure, key="microscope_spectrum", height=230)


def _facts(reading: Reading, close_up: CloseUp | None, view: View) -> dict[str, Any]:
    """What the browser shows of every depth."""
    names = depth_names(reading)
    facts: dict[str, Any] = {
        "names": [visible(name) for name in names],
        "numbers": _numbers(reading, view, len(names)),
        "findings": _findings(reading),
        "most": MOST_CARDS,
        "connections": [],
        "tokens": None,
    }
    if close_up is not None:
        facts["tokens"] = [_tokens(close_up, depth, view.stream) for depth in range(close_up.num_depths)]
        facts["connections"] = [close_up.connections_at(depth) for depth in range(close_up.num_depths)]
        if close_up.num_connections:
            singles, products = close_up.pictures(view.whose, view.token)
            named = [
                {**each, "name": close_up.connection_name(i)} for i, each in enumerate(_documents(singles))
            ]
            facts |= {"matrices": named, "products": _documents(products)}
            facts["connections"] = facts["connections"] if named else []
    return facts


def _findings(reading: Reading) -> list[dict[str, Any]]:
    """Findings that have a place on the axis, the worst first."""
    placed = [(each, range_of(each.finding, reading.analysis)) for each in cards_of(reading)]
    return [
        {
            "severity": each.severity,
            "sign": BADGES[each.severity][2],
            "title": visible(each.title),
            "where": visible(each.where),
            "why": visible(each.why),
            "next": visible(each.next),
            "experiment": visible(each.experiment),
            "first": place[0],
            "last": place[1],
        }
        for each, place in placed
        if place is not None
    ]


def _numbers(reading: Reading, view: View, depths: int) -> list[dict[str, Any]]:
    rows = []
    for metric in NUMBERS:
        values = pick(reading.analysis, metric, Selection(stream=view.stream))
        if values is None or values.dims != ("depth",):
            continue
        null = pick(reading.analysis, f"{metric}_null", Selection(stream=view.stream))
        noise = (
            ["–"] * depths
            if null is None
            else [number(float(each)) for each in np.broadcast_to(null, depths)]
        )
        rows.append(
            {
                "name": spoken(metric),
                "help": CATALOGUE[metric].title,
                "values": [number(float(each)) for each in values.values],
                "noise": noise,
            }
        )
    return rows


def _tokens(close_up: CloseUp, depth: int, stream: str) -> dict[str, list[list[Any]]]:
    return {
        name: [
            [
                *each[:3],
                *([each.feature] if name == "entries" else []),
                number(each.value),
                number(each.ratio),
            ]
            for each in close_up.largest(depth, entries=name == "entries", stream=stream)
        ]
        for name in ("tokens", "entries")
    }


def _documents(matrices: Sequence[Matrix]) -> list[dict[str, Any]]:
    return [
        {
            "of": each.of,
            "h": _rounded(each.h_res),
            "pre": None if each.h_pre is None else _rounded(each.h_pre),
            "post": None if each.h_post is None else _rounded(each.h_post),
            "eigenvalues": _rounded(np.stack([each.eigenvalues.real, each.eigenvalues.imag], axis=1)),
        }
        for each in matrices
    ]


def _rounded(values: np.ndarray) -> Any:
    """Six digits, and None for what JSON has no number for."""
    plain = [float(f"{value:.6g}") if np.isfinite(value) else None for value in np.ravel(values)]
    return np.array(plain, dtype=object).reshape(values.shape).tolist()


def show_matrices(matrices: Sequence[Matrix]) -> None:
    """One of some matrices with its sums and its eigenvalues, and the choice of it."""
    _bench(data={"name": "bench", "what": "bench", "matrices": _documents(matrices)}, key="matrices_bench")
