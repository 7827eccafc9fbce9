"""What happens at which depth, to which token, in which stream? Panels over one depth axis, with the findings above them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import PLOTLY_SOURCE, component
from depthscope.app.drawing.plotly import reduction_words, shrink
from depthscope.app.drawing.plotly.panels import Bar, Panel, draw_panels, panels_height
from depthscope.app.figures import FIGURES, Figure, Heatmap, Lines, available
from depthscope.app.figures.build.matrix_figure import picture_figure
from depthscope.app.figures.build.values import level_of, names_of
from depthscope.app.readings.close_up import TOKEN_MEASURES, CloseUp
from depthscope.app.readings.depth_map import range_of
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import visible
from depthscope.diagnostics.verdicts.causes import worst_depth

DEFAULT_STRIPS = (
    "effective_rank",
    "adjacent_angle",
    "residual_norm",
    "gradient_norm",
    "stream_cosine",
    "composite_gain",
)
"""Shown where the run feeds them, from top to bottom."""

TOKEN_ROWS = 3.2
"""Pixels of a token in the map."""

NAMED_TOKENS = 3
"""Tokens whose text is at the side of the map: those with the largest values."""

LINE = 13
"""Pixels that a line of text needs."""

PICTURE_ROW = 11
"""Pixels of a row of the pictures of H_res."""

MOST_BARS = 8
"""Findings above the panels; the others are on the page Home."""

MASSIVE = 10
"""Times the median token of the map: such tokens have rows of their own, above the map. A heuristic of ours."""

MOST_MASSIVE = 4

_component = component("panels", "plotly_page")
_text = component("token_text", "numbers", "matrices")


@dataclass(frozen=True)
class View:
    """What a visitor has chosen under the microscope.

    ``strips``: names of figures.
    ``measure``: a key of `TOKEN_MEASURES`.
    ``sequence``: whose tokens are shown.
    ``stream``: ``mean`` or the number of a stream.
    ``pin``: the depth that is pinned.
    ``whose``: whose H_res is shown, a key of `WHOSE`.
    ``token``: sequence and position of the token that is marked.
    """

    strips: tuple[str, ...]
    measure: str
    sequence: int
    stream: str
    pin: int
    whose: str = "mean"
    token: tuple[int, int] | None = None


def strips_of(reading: Reading) -> tuple[list[str], list[str]]:
    """Curves that a reading feeds and that have a depth: all of them, and those shown at first."""
    kinds = available({reading.name: reading.analysis})
    names = [name for name, kind in kinds.items() if _axis_of(kind.metric, reading)]
    return names, [name for name in DEFAULT_STRIPS if name in names]


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


def show_panels(reading: Reading, close_up: CloseUp | None, view: View, *, on_pin: Any) -> list[str]:
    """The panels of a reading.

    ``close_up``: its states, where the run has them.
    Returns: The curves that are the same at every depth, with their number: they are not drawn.
    """
    # The panels are the same at every pin.
    data, flat = remembered(
        "microscope_drawn", (reading, close_up), replace(view, pin=0), lambda: _drawn(reading, close_up, view)
    )
    _component(
        data={
            "name": "microscope",
            **data,
            "pin": pinned_by_page("microscope", view.pin),
            "plotly": PLOTLY_SOURCE,
        },
        key="microscope",
        on_pin_change=on_pin,
    )
    return flat


def remembered(key: str, of: tuple[Any, ...], choice: Any, make: Callable[[], Any]) -> Any:
    """What was made last of some objects and a choice; made anew where either is another one."""
    kept = st.session_state.get(key)
    if kept is None or kept[1] != choice or any(map(operator.is_not, kept[0], of)):
        kept = st.session_state[key] = (of, choice, make())
    return kept[2]


def show_text(close_up: CloseUp, names: Sequence[str], view: View) -> None:
    """The text of the sequence, coloured by the numbers of its tokens at the depth under the cursor, or that is pinned."""
    last = _length(close_up, view.sequence)
    z = close_up.token_map(view.measure, view.sequence, view.stream)[:last]
    rounded = [[float(f"{each:.6g}") if np.isfinite(each) else None for each in row] for row in z]
    at = min(view.pin, close_up.num_depths - 1)
    _text(
        data={
            "name": "microscope",
            "what": "text",
            "texts": close_up.texts(view.sequence)[:last],
            "values": rounded,
            "names": list(names) or [str(depth) for depth in range(close_up.num_depths)],
            "depth": at,
            "sequence": view.sequence,
            "measure": TOKEN_MEASURES[view.measure],
            "log": _is_spread(view.measure, z),
            "first": int(np.argmax(np.nan_to_num(np.abs(z[:, at]), nan=-1.0))) if last else 0,
        },
        key="token_text",
    )


def pinned_by_page(key: str, pin: float | None) -> float | None:
    """The pin that the page sends to the panels: its former one where the panels set the present one themselves.

    The same data are then not sent again.
    """
    sent = f"{key}_sent_pin"
    set_by_panels = st.session_state.get(key, {}).get("pin") or {}
    if sent not in st.session_state or set_by_panels.get("depth", -1) != pin:
        st.session_state[sent] = pin
    found: float | None = st.session_state[sent]
    return found


def _drawn(reading: Reading, close_up: CloseUp | None, view: View) -> tuple[dict[str, Any], list[str]]:
    """The panels for the browser, and the curves that are the same at every depth."""
    names = depth_names(reading)
    bars = _bars(reading, len(names))
    panels, flat = [], []
    for name in view.strips:
        panel = _strip(name, reading)
        # The last row of a training may lack what the run has elsewhere.
        if isinstance(panel.figure, Lines) and not panel.figure.numbers("measured").size:
            continue
        level = level_of(panel.figure)
        if level is None:
            panels.append(panel)
        else:
            flat.append(f"{FIGURES[name].title.removesuffix(' across depth')} ({number(level)})")
    rows = 0
    if close_up is not None:
        if close_up.num_connections:
            panels += _picture_panels(reading, close_up, view, len(names))
        panels += _token_panels(close_up, view)
        rows = 1 + len(panels)
        if close_up.num_streams > 1:
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
            panels.append(Panel(figure, height=18 * close_up.num_streams + 12))
    data = {
        "figure": draw_panels(panels, bars, names).to_json(),
        "height": panels_height(panels, bars),
        "places": list(range(len(names))),
        "names": names,
        "rows": f"yaxis{rows}" if rows else "",
        "token": _marked_row(view),
        "tokens": [] if close_up is None else np.flatnonzero(close_up.mask[view.sequence]).tolist(),
        "alt": visible(
            f"Panels over the {len(names)} depths of {reading.name}: "
            f"{', '.join(panel.figure.title for panel in panels)}. Left and right arrow pin a depth, up and down "
            " mark a token, enter goes to the numbers of the depth."
        ),
    }
    return data, flat


def depth_names(reading: Reading) -> list[str]:
    """What people call each depth of a reading."""
    along = next((array for array in reading.analysis.data_vars.values() if "depth" in array.dims), None)
    return [] if along is None else names_of(along, "depth")


def _strip(name: str, reading: Reading) -> Panel:
    kind = FIGURES[name]
    analyses = {reading.name: reading.analysis}
    figure: Figure = kind.build(analyses)
    if isinstance(figure, Lines) and "tokens" in kind.uses:
        # Without massive activations too: they dominate ranks and similarities.
        ordinary = kind.build(analyses, tokens="ordinary")
        if isinstance(ordinary, Lines):
            words = " · without massive tokens"
            added = [replace(line, label=f"{line.label}{words}") for line in ordinary.of("measured")]
            figure = replace(figure, lines=(*figure.lines, *added))
    depths = None
    if _axis_of(kind.metric, reading) == "connection":
        depths = {float(i): float(depth) for i, depth in enumerate(_depths_of_connections(reading))}
    # Title and unit in one line: a panel is too low for the words of an axis at its side.
    title = figure.title.removesuffix(" across depth")
    if figure.y_label.casefold() != title.casefold():
        title = f"{title}: {figure.y_label}"
    return Panel(replace(figure, title=title), depths=depths)


def _depths_of_connections(reading: Reading) -> list[int]:
    """The depth that each connection writes."""
    analysis = reading.analysis
    known = "depth_out" in analysis.coords
    places = analysis["depth_out"].values if known else np.arange(analysis.sizes.get("connection", 0)) + 1
    return list(map(int, places))


def _bars(reading: Reading, depths: int) -> list[Bar]:
    bars = [
        Bar(spoken(finding.verdict), finding.severity.name, max(where[0], 0), min(where[1], depths - 1))
        for finding in reading.findings
        if (where := range_of(finding, reading.analysis)) is not None
    ]
    return bars[:MOST_BARS]


def _length(close_up: CloseUp, sequence: int) -> int:
    """Without the padding at the end, which would only take room."""
    return int(np.flatnonzero(close_up.mask[sequence]).max(initial=0)) + 1


def _is_spread(measure: str, z: np.ndarray) -> bool:
    """Whether logarithms are shown: norms of massive tokens are a hundred times those of the others."""
    known = z[np.isfinite(z) & (z > 0)]
    return measure == "norm" and known.size > 0 and bool(known.max() > 10 * known.min())


def _token_panels(close_up: CloseUp, view: View) -> list[Panel]:
    """The map of all tokens, and above it one of those that are massive, in rows that are seen."""
    z = close_up.token_map(view.measure, view.sequence, view.stream)[: _length(close_up, view.sequence)]
    texts = close_up.quoted(view.sequence)
    tokens = [f"{position} {text}" if close_up.has_texts else text for position, text in enumerate(texts)]
    size = np.nan_to_num(np.abs(z), nan=-1.0)
    times = (size / np.maximum(np.median(size, axis=0), 1e-300)).max(axis=1) if len(z) else np.zeros(0)
    massive = np.argsort(-times)[: int(min((times > MASSIVE).sum(), MOST_MASSIVE))]
    panels = [_token_map(view, z, tokens)]
    if view.measure == "norm" and massive.size:
        shown = [tokens[row] for row in massive]
        title = f"Massive tokens: more than {MASSIVE} times the median token"
        figure = _heat_map(view, title, z[massive], shown)
        panels.insert(0, Panel(figure, height=LINE * len(massive) + 4, ticks=dict(enumerate(shown))))
    return panels


def _heat_map(view: View, title: str, z: np.ndarray, tokens: Sequence[str]) -> Heatmap:
    """Tokens over depths, reduced where there are more than a screen shows."""
    figure = Heatmap(
        "tokens",
        title,
        np.arange(z.shape[1]),
        np.arange(len(z)),
        z,
        "depth",
        "position",
        "",
        log_z=_is_spread(view.measure, z),
        y_text=tokens[: len(z)],
        from_top=True,
        # A mean would hide the one massive token among its neighbours.
        of_block="largest" if view.measure == "norm" else "mean",
    )
    note = reduction_words(figure)
    return replace(shrink(figure), title=f"{figure.title} ({note})" if note else figure.title)


def _token_map(view: View, z: np.ndarray, tokens: Sequence[str]) -> Panel:
    last = len(z)
    figure = _heat_map(view, f"Tokens of sequence {view.sequence}: {TOKEN_MEASURES[view.measure]}", z, tokens)
    # The names of the tokens that differ most; the others are named where the mouse is.
    largest = np.nan_to_num(np.abs(z), nan=-1.0).max(axis=1)
    height = int(np.clip(TOKEN_ROWS * last, 120, 420))
    marked = _marked_row(view)
    ticks = {} if marked is None or marked >= last else {marked: tokens[marked]}
    for token in np.argsort(-largest):
        if len(ticks) < NAMED_TOKENS and all(abs(token - each) * height >= LINE * last for each in ticks):
            ticks[int(token)] = tokens[token]
    return Panel(figure, height=height, ticks=ticks, marked=marked)


def _marked_row(view: View) -> int | None:
    """The token that is marked, where the map shows its sequence."""
    return view.token[1] if view.token is not None and view.token[0] == view.sequence else None


def _picture_panels(reading: Reading, close_up: CloseUp, view: View, depths: int) -> list[Panel]:
    """H_res at the depth that each connection writes, and below it the product of all up to there."""
    panels = []
    n = close_up.num_streams
    titles = ("H_res of each connection", "Product of H_res from the embedding")
    for title, matrices in zip(titles, close_up.pictures(view.whose, view.token), strict=True):
        if matrices:
            figure = picture_figure(
                [each.h_res for each in matrices],
                [close_up.connection_name(number) for number in range(len(matrices))],
                _depths_of_connections(reading),
                depths,
                name="h_res",
                title=f"{title}, and its sums − 1",
                run=reading.name,
                x_label="depth",
                of=matrices[0].of,
            )
            ticks = {0: "to 0", n - 1: f"to {n - 1}", n + 1: "sum − 1"}
            panels.append(Panel(figure, height=PICTURE_ROW * (n + 2), ticks=ticks))
    return panels
