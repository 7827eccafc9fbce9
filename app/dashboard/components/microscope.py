"""What happens at which depth, to which token, in which stream? Panels over one depth axis, and all about one depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.chart import PLOTLY_SOURCE, card, plotly_component, show_drawing
from depthscope.app.dashboard.components.finding_card import show_card
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.drawing.plotly import reduction_words, shrink
from depthscope.app.drawing.plotly.stack import (
    SEVERITY_COLOURS,
    Bar,
    Panel,
    draw_stack,
    eigenvalue_plane,
    stack_height,
)
from depthscope.app.figures import FIGURES, Figure, Heatmap, Lines, Selection, available
from depthscope.app.figures.build.values import names_of, pick
from depthscope.app.readings.close_up import TOKEN_MEASURES, CloseUp, Matrix
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.findings import cards_of
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import visible
from depthscope.diagnostics import Finding
from depthscope.diagnostics.verdicts.causes import worst_depth

__all__ = [
    "View",
    "depth_names",
    "first_pin",
    "pinned_by_page",
    "show_detail",
    "show_matrices",
    "show_panels",
    "strips_of",
]

DEFAULT_STRIPS = (
    "effective_rank",
    "adjacent_angle",
    "residual_norm",
    "gradient_norm",
    "stream_cosine",
    "composite_gain",
)
"""Shown where the run feeds them, from top to bottom."""

NUMBERS = (
    *("effective_rank", "participation_ratio", "token_cosine", "dong_residual", "adjacent_cka"),
    *("adjacent_angle", "branch_share", "massive_activation", "residual_norm", "gradient_norm"),
    *("backward_gain", "stream_cosine", "sink_mass"),
)
"""Metrics of the table of numbers, in its order."""

TOKEN_ROWS = 3.2
"""Pixels of a token in the map."""

NAMED_TOKENS = 3
"""Tokens whose text stands beside the map: those with the largest values."""

LINE = 13
"""Pixels that a line of text needs."""

MOST_CARDS = 3
"""Findings beside the panels."""

MOST_BARS = 8
"""Findings above the panels; the others are on the page of runs."""

_DRAWN = "microscope_drawn"

_component = plotly_component("panels")


@dataclass(frozen=True)
class View:
    """What a visitor has chosen under the microscope.

    Parameters
    ----------
    strips : tuple of str
        Names of figures.
    measure : str
        A key of `TOKEN_MEASURES`.
    sequence : int
        Whose tokens are shown.
    stream : str
        ``mean`` or the number of a stream.
    pin : int
        The depth that is pinned.
    other : int or None
        The one that it is compared with.
    """

    strips: tuple[str, ...]
    measure: str
    sequence: int
    stream: str
    pin: int
    other: int | None


def strips_of(reading: Reading) -> tuple[list[str], list[str]]:
    """Curves that a reading feeds and that have a depth: all of them, and those shown at first."""
    analyses = _analyses(reading)
    names = [name for name, kind in available(analyses).items() if _axis_of(kind.metric, reading)]
    return names, [name for name in DEFAULT_STRIPS if name in names]


def _analyses(reading: Reading) -> dict[str, xr.Dataset]:
    return {reading.name: reading.analysis}


def _axis_of(metric: str, reading: Reading) -> str:
    """``depth`` or ``connection`` for what is a curve over one of them."""
    dims = set(reading.analysis[metric].dims) if metric in reading.analysis else set()
    if dims & {"component", "other_depth", "other_connection", "head", "eigenvalue", "source", "order"}:
        return ""
    return next((axis for axis in ("depth", "connection") if axis in dims), "")


def first_pin(reading: Reading) -> int:
    """The depth that is pinned before the visitor pins one: where the worst finding is worst, else the last one."""
    last = max(len(depth_names(reading)) - 1, 0)
    places = (worst_depth(finding, reading.analysis) for finding in reading.findings)
    return next((min(max(depth, 0), last) for depth in places if depth is not None), last)


def show_panels(reading: Reading, close_up: CloseUp | None, view: View, *, on_pin: Any) -> None:
    """The panels of a reading.

    ``close_up``: its states, where the run has them.
    """
    drawn = st.session_state.get(_DRAWN)
    if drawn is None or not drawn.is_of(reading, close_up, view):
        drawn = st.session_state[_DRAWN] = _Drawn.of(reading, close_up, view)
    _component(
        data={
            "name": "microscope",
            **drawn.data,
            **pinned_by_page("microscope", view.pin, view.other),
            "plotly": PLOTLY_SOURCE,
        },
        key="microscope",
        on_pin_change=on_pin,
    )


def pinned_by_page(key: str, pin: float | None, other: float | None) -> dict[str, float | None]:
    """What the panels are told to pin: nothing new where they pinned it themselves, so that the same data are not sent again.

    ``pin, other``: what is pinned, and what it is compared with.
    """
    told = st.session_state.get(f"{key}_told")
    own = st.session_state.get(key, {}).get("pin") or {}
    if told is None or (own.get("depth", -1), own.get("other", -1)) != (pin, other):
        told = st.session_state[f"{key}_told"] = {"pin": pin, "other": other}
    return dict(told)


@dataclass(frozen=True)
class _Drawn:
    """The panels as they were drawn last: they are the same at every pin."""

    reading: Reading
    close_up: CloseUp | None
    view: View
    data: dict[str, Any]

    @classmethod
    def of(cls, reading: Reading, close_up: CloseUp | None, view: View) -> _Drawn:
        names = depth_names(reading)
        bars = _bars(reading, close_up, len(names))
        panels = [_strip(name, reading, close_up) for name in view.strips]
        if close_up is not None:
            panels.append(_token_panel(close_up, view))
            if close_up.num_streams > 1:
                panels.append(_stream_panel(close_up))
        data = {
            "figure": draw_stack(panels, bars, names).to_json(),
            "height": stack_height(panels, bars),
            "places": list(range(len(names))),
            "names": names,
            "alt": visible(
                f"Panels over the {len(names)} depths of {reading.name}: "
                f"{', '.join(panel.figure.title for panel in panels)}. Left and right arrow pin a depth, with shift the "
                "one to compare with, escape forgets it, enter opens the numbers beside."
            ),
        }
        return cls(reading, close_up, view, data)

    def is_of(self, reading: Reading, close_up: CloseUp | None, view: View) -> bool:
        same = replace(view, pin=self.view.pin, other=self.view.other)
        return self.reading is reading and self.close_up is close_up and same == self.view


def depth_names(reading: Reading) -> list[str]:
    """What people call each depth of a reading."""
    along = next((array for array in reading.analysis.data_vars.values() if "depth" in array.dims), None)
    return [] if along is None else names_of(along, "depth")


def _strip(name: str, reading: Reading, close_up: CloseUp | None) -> Panel:
    kind = FIGURES[name]
    analyses = _analyses(reading)
    figure: Figure = kind.build(analyses)
    if isinstance(figure, Lines) and "tokens" in kind.uses:
        # Without massive activations too: they dominate ranks and similarities.
        ordinary = kind.build(analyses, tokens="ordinary")
        if isinstance(ordinary, Lines):
            added = [
                replace(line, label=f"{line.label} · without massive tokens")
                for line in ordinary.lines
                if line.role == "measured"
            ]
            figure = replace(figure, lines=(*figure.lines, *added))
    depths = None
    if _axis_of(kind.metric, reading) == "connection":
        depths = {float(i): float(depth) for i, depth in enumerate(_depths_of_connections(reading, close_up))}
    return Panel(replace(figure, title=_panel_title(figure)), depths=depths)


def _panel_title(figure: Figure) -> str:
    """Title and unit in one line: beside so low a panel there is no room for the words of an axis."""
    title = figure.title.removesuffix(" across depth")
    return title if figure.y_label.casefold() == title.casefold() else f"{title}: {figure.y_label}"


def _depths_of_connections(reading: Reading, close_up: CloseUp | None) -> np.ndarray:
    """The depth that each connection writes."""
    if "depth_out" in reading.analysis.coords:
        return np.asarray(reading.analysis["depth_out"].values, dtype=int)
    if close_up is not None and close_up.num_connections:
        return close_up.depth_out
    return np.arange(reading.analysis.sizes.get("connection", 0)) + 1


def _bars(reading: Reading, close_up: CloseUp | None, depths: int) -> list[Bar]:
    placed = [
        (finding, _range_of(finding, reading, close_up))
        for finding in reading.findings
        if finding.severity.name in SEVERITY_COLOURS
    ]
    bars = [
        Bar(spoken(finding.verdict), finding.severity.name, max(where[0], 0), min(where[1], depths - 1))
        for finding, where in placed
        if where is not None
    ]
    return bars[:MOST_BARS]


def _range_of(finding: Finding, reading: Reading, close_up: CloseUp | None) -> tuple[int, int] | None:
    """The depths of a finding; None where it is about the whole run or a module."""
    if finding.first < 0 or finding.axis not in ("depth", "connection"):
        return None
    if finding.axis == "depth":
        return finding.first, finding.last
    depths = _depths_of_connections(reading, close_up)
    known = depths[finding.first : finding.last + 1]
    return (int(known.min()), int(known.max())) if len(known) else None


def _token_panel(close_up: CloseUp, view: View) -> Panel:
    z = close_up.token_map(view.measure, view.sequence, view.stream)
    texts = close_up.texts(view.sequence)
    tokens = [f"{position} “{text}”" for position, text in enumerate(texts)]
    # Padding at the end would only take room.
    last = int(np.flatnonzero(close_up.mask[view.sequence]).max(initial=0)) + 1
    spread = z[np.isfinite(z) & (z > 0)]
    figure = Heatmap(
        "tokens",
        f"Tokens of sequence {view.sequence}: {TOKEN_MEASURES[view.measure]}",
        np.arange(close_up.num_depths),
        np.arange(last),
        z[:last],
        "depth",
        "position",
        "",
        # Norms of massive tokens are a hundred times those of the others.
        log_z=view.measure == "norm" and spread.size > 0 and spread.max() > 10 * spread.min(),
        y_text=tokens[:last],
        # As the map of the page Tokens.
        of_block="largest" if view.measure == "norm" else "mean",
    )
    note = reduction_words(figure)
    figure = replace(shrink(figure), title=f"{figure.title} ({note})" if note else figure.title)
    # The names of the tokens that stand out; the others are named where the mouse is.
    largest = np.nan_to_num(np.abs(z[:last]), nan=-1.0).max(axis=1)
    height = int(np.clip(TOKEN_ROWS * last, 120, 420))
    ticks: dict[int, str] = {}
    for token in np.argsort(-largest):
        if len(ticks) < NAMED_TOKENS and all(abs(token - each) * height >= LINE * last for each in ticks):
            ticks[int(token)] = tokens[token]
    return Panel(figure, height=height, ticks=ticks)


def _stream_panel(close_up: CloseUp) -> Panel:
    figure = Heatmap(
        "streams",
        "Root mean square norm of each stream",
        np.arange(close_up.num_depths),
        np.arange(close_up.num_streams),
        close_up.stream_map(),
        "depth",
        "stream",
        "",
    )
    return Panel(figure, height=18 * close_up.num_streams + 12)


def show_detail(reading: Reading, close_up: CloseUp | None, view: View) -> None:
    """All about the depth that is pinned."""
    names = depth_names(reading)
    against = f" against depth {view.other}" if view.other is not None else ""
    st.markdown(f"##### Depth {view.pin}{against}: {escaped(names[view.pin])}")
    touching = [
        each
        for each in cards_of(reading)
        if (where := _range_of(each.finding, reading, close_up)) and where[0] <= view.pin <= where[1]
    ]
    for each in touching[:MOST_CARDS]:
        if each.severity == "INFO":
            with st.expander(f"● {escaped(each.title)}"):
                show_card(each)
        else:
            show_card(each)
    if close_up is not None and close_up.num_connections:
        _show_connections(close_up, view)
    st.table(_numbers_at(reading, view, len(names)), border="horizontal")
    if close_up is None:
        st.caption("The run has no states of single tokens, or its file has changed: reload this page.")
        return
    _show_tokens(close_up, view)
    if "singular_value" in reading.analysis:
        chosen = (view.pin,) if view.other is None else tuple(sorted({view.pin, view.other}))
        figure = FIGURES["spectrum"].build(_analyses(reading), depths=chosen)
        card(figure, key="microscope_spectrum", height=230)


def _numbers_at(reading: Reading, view: View, depths: int) -> pd.DataFrame:
    pin = view.pin
    around = [depth for depth in (pin - 1, pin, pin + 1) if 0 <= depth < depths]
    places = around if view.other is None else [pin, view.other]
    rows: dict[str, list[str]] = {}
    for metric in NUMBERS:
        values = pick(reading.analysis, metric, Selection(stream=view.stream))
        if values is None or values.dims != ("depth",):
            continue
        row = [number(float(values.isel(depth=place))) for place in places]
        null = pick(reading.analysis, f"{metric}_null", Selection(stream=view.stream))
        noise = (
            number(float(null.isel(depth=pin) if "depth" in null.dims else null)) if null is not None else "–"
        )
        rows[escaped(spoken(metric))] = [*row, noise]
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=[*(f"depth {place}" for place in places), f"null at {pin}"]
    )


def _show_tokens(close_up: CloseUp, view: View) -> None:
    pin = view.pin
    tokens = pd.DataFrame(
        [
            {
                "largest tokens": each.text,
                "sequence": each.sequence,
                "position": each.position,
                "norm": number(each.norm),
                "× median": number(each.ratio),
            }
            for each in close_up.largest_tokens(pin, stream=view.stream)
        ]
    )
    entries = pd.DataFrame(
        [
            {
                "largest entries": each.text,
                "sequence": each.sequence,
                "position": each.position,
                "feature": each.feature,
                "value": number(each.value),
                "× median": number(each.ratio),
            }
            for each in close_up.largest_entries(pin, stream=view.stream)
        ]
    )
    for table in (tokens, entries):
        st.dataframe(table, hide_index=True, row_height=28, height=32 + 28 * max(len(table), 1))


def _show_connections(close_up: CloseUp, view: View) -> None:
    pin = view.pin
    for connection in close_up.connections_at(pin):
        st.markdown(f"**H_res of {escaped(close_up.connection_name(connection))}**")
        show_matrices(close_up.matrices(connection), f"connection{connection}")
    other = view.other if view.other is not None else 0
    first, last = sorted((pin, other))
    inside = [
        connection
        for connection in range(close_up.num_connections)
        if close_up.depth_in[connection] >= first and close_up.depth_out[connection] <= last
    ]
    if len(inside) > 1:
        st.markdown(f"**Product of H_res from depth {first} to depth {last}** ({len(inside)} connections)")
        show_matrices(close_up.composite(inside[0], inside[-1]), "composite")


def show_matrices(matrices: Sequence[Matrix], key: str) -> None:
    """One of some matrices with its sums and its eigenvalues, and the choice of it."""
    if not matrices:
        st.caption("No token of the run is real.")
        return
    words = [each.of for each in matrices]
    chosen = st.selectbox(
        "Of which token",
        range(len(words)),
        format_func=lambda i: words[i],
        key=f"microscope_{key}",
        label_visibility="collapsed",
    )
    matrix = matrices[chosen]
    st.table(_matrix_table(matrix), border="horizontal")
    drawing = eigenvalue_plane({matrix.of: list(matrix.eigenvalues)})
    show_drawing(
        drawing.to_json(),
        name=f"eigenvalues_{key}",
        alt=f"Eigenvalues of H_res, {matrix.of}: {', '.join(f'{value:.3g}' for value in matrix.eigenvalues)}",
        key=f"microscope_eigenvalues_{key}",
        height=210,
    )


def _matrix_table(matrix: Matrix) -> pd.DataFrame:
    size = len(matrix.h_res)
    table = pd.DataFrame(
        [[number(float(value)) for value in row] for row in matrix.h_res],
        index=[f"to {i}" for i in range(size)],
        columns=[f"from {i}" for i in range(size)],
    )
    table["row sum"] = [number(float(value)) for value in matrix.row_sums]
    for name, weights in (("H_post", matrix.h_post), ("H_pre", matrix.h_pre)):
        if weights is not None:
            table[name] = [number(float(value)) for value in weights]
    sums = [number(float(value)) for value in matrix.column_sums]
    table.loc["column sum"] = [*sums, *[""] * (table.shape[1] - size)]
    return table
