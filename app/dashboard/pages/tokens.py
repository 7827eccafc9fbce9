"""Which tokens are large, similar or lost? The text coloured by a number, its map over depth, and a table of all tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chart import card, component
from depthscope.app.dashboard.components.choices import choose_index, choose_one
from depthscope.app.dashboard.components.figure_numbers import cut_words, offer_csv, show_frame
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.microscope import depth_names
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import Heatmap
from depthscope.app.readings.close_up import TOKEN_MEASURES, CloseUp
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.token_rows import found_tokens, token_rows
from depthscope.app.text.numbers import number

ROW = 15
"""Pixels of a token in the map where its text is at its side."""

_text = component("token_text", "numbers", "matrices")

_ORDER = (
    *("position", "text", "norm", "times median", "massive", "distance to mean"),
    *("cosine with last state", "largest feature", "its value"),
)

_COLUMNS = {
    "position": st.column_config.NumberColumn(width=60),
    "text": st.column_config.TextColumn(width=98),
    "norm": st.column_config.NumberColumn(width=62),
    "times median": st.column_config.NumberColumn("× median", width=76, help="times median"),
    "massive": st.column_config.CheckboxColumn(width=64),
    "distance to mean": st.column_config.NumberColumn(
        "distance", width=66, help="distance to the mean token"
    ),
    "cosine with last state": st.column_config.NumberColumn(
        "cos last", width=66, help="cosine with the last state"
    ),
    "largest feature": st.column_config.NumberColumn("feature", width=62, help="largest feature"),
    "its value": st.column_config.NumberColumn("value", width=62, help="value of the largest feature"),
}
"""Names and widths in pixels such that all columns are seen at once on a laptop."""


def _show(chosen: ChosenRuns) -> None:
    controls = st.container(horizontal=True, vertical_alignment="bottom")
    with controls:
        reading = chosen.readings[choose_one("Run", list(chosen.readings), "tokens_run", width=200)]
    close_up = run_library.close_up_of(reading)
    if close_up is None:
        _explain_no_states(reading)
        return
    with controls:
        sequences = [str(i) for i in range(close_up.num_sequences)]
        sequence = int(choose_one("Sequence", sequences, "tokens_sequence", width=110))
        streams = ["mean", *map(str, range(close_up.num_streams))] if close_up.num_streams > 1 else ["mean"]
        stream = choose_one("Stream", streams, "tokens_stream", width=110)
        measure = choose_one(
            "Map", list(TOKEN_MEASURES), "tokens_measure", words=TOKEN_MEASURES.__getitem__, width=330
        )
        last = close_up.num_depths - 1
        # In the middle sinks have their full size, and the last norm has not hidden them yet.
        depth = choose_index("Depth", last, "tokens_depth", default=last // 2)
    if not close_up.has_texts:
        st.info(
            "The run has no text of its tokens: they are numbered. `depthscope probe CHECKPOINT --text FILE` saves it.",
            icon="ℹ️",
        )
    if close_up.num_sequences < close_up.sequences:
        st.caption(
            f"The first {close_up.num_sequences} of {close_up.sequences} sequences: the others do not fit into memory."
        )
    if not close_up.mask[sequence].any():
        st.info(f"Sequence {sequence} has no real token: all of it is padding. Choose another one.", icon="ℹ️")
        return
    with st.container(border=True):
        names = depth_names(reading) or [str(i) for i in range(close_up.num_depths)]
        _show_text(close_up, names, measure, sequence, stream, depth)
    left, right = st.columns([3, 5], gap="medium")
    with left:
        figure = token_figure(close_up, measure, sequence, stream, reading.name)
        rows = figure.z.shape[0]
        height = int(np.clip(ROW * rows + 60, 240, 640))
        card(figure, key="tokens_map", height=height)
    with right:
        _show_table(reading, close_up, depth, sequence, stream)


def _show_text(
    close_up: CloseUp, names: list[str], measure: str, sequence: int, stream: str, depth: int
) -> None:
    """The text itself, coloured; the browser has the numbers of all depths."""
    z = close_up.token_map(measure, sequence, stream)[: _length(close_up, sequence)]
    known = z[np.isfinite(z)]
    rounded = [[float(f"{each:.6g}") if np.isfinite(each) else None for each in row] for row in z]
    st.markdown("## Text")
    _text(
        data={
            "name": "token_text",
            "texts": close_up.texts(sequence)[: len(z)],
            "values": rounded,
            "names": names,
            "depth": depth,
            "sequence": sequence,
            "measure": TOKEN_MEASURES[measure],
            "log": _is_spread(measure, known),
            "first": int(np.argmax(np.nan_to_num(np.abs(z[:, depth]), nan=-1.0))),
        },
        key="token_text",
        on_depth_change=_put_depth,
    )


def _put_depth() -> None:
    depth = (st.session_state.get("token_text") or {}).get("depth")
    if isinstance(depth, (int, float)):
        st.session_state["tokens_depth"] = int(depth)


def _length(close_up: CloseUp, sequence: int) -> int:
    """Without the padding at the end, which would only take room."""
    return int(np.flatnonzero(close_up.mask[sequence]).max(initial=0)) + 1


def _is_spread(measure: str, known: np.ndarray) -> bool:
    """Whether logarithms are shown: norms of massive tokens are a hundred times those of the others."""
    spread = known[known > 0]
    return measure == "norm" and bool(spread.size) and bool(spread.max() > 10 * spread.min())


def _explain_no_states(reading: Reading) -> None:
    st.info(
        f"{escaped(reading.name)} has no states of single tokens: it was made of weights or of sums alone, or its file has "
        "changed. Measure the model on a text, then reload this page:",
        icon="ℹ️",
    )
    st.code("depthscope probe CHECKPOINT --text FILE --out NEW.zarr", "bash")


def token_figure(close_up: CloseUp, measure: str, sequence: int, stream: str, run: str) -> Heatmap:
    """The map of a sequence: its tokens over the depths."""
    z = close_up.token_map(measure, sequence, stream)[: _length(close_up, sequence)]
    texts = close_up.quoted(sequence)
    undefined = int(np.isnan(z[close_up.mask[sequence][: len(z)]]).sum())
    gaps = f" {undefined} of its numbers are undefined, and are gaps." if undefined else ""
    largest = np.unravel_index(int(np.nanargmax(np.abs(z))), z.shape) if np.isfinite(z).any() else None
    named = [f"token {n} {text}" for n, text in enumerate(texts)] if close_up.has_texts else texts
    telling = (
        f"The largest is {number(float(z[largest]))}, of {named[largest[0]]} at depth {largest[1]}."
        if largest is not None
        else "All of them are undefined."
    )
    return Heatmap(
        name="tokens",
        title=f"Tokens of sequence {sequence}: {TOKEN_MEASURES[measure]}",
        x=np.arange(z.shape[1], dtype=float),
        y=np.arange(len(z), dtype=float),
        z=z,
        x_label="depth (0 = embedding)",
        y_label="position",
        z_label="",
        log_z=_is_spread(measure, z[np.isfinite(z)]),
        caption=f"{telling} Run {run}.{gaps}",
        alt=f"{TOKEN_MEASURES[measure]} of {len(z)} tokens at {z.shape[1]} depths of {run}. {telling}{gaps}",
        x_text=[f"depth {i}" for i in range(z.shape[1])],
        y_text=texts[: len(z)],
        run=run,
        square=False,
        from_top=True,
        # A mean would hide the one massive token among its neighbours.
        of_block="largest" if measure == "norm" else "mean",
    )


def _show_table(reading: Reading, close_up: CloseUp, depth: int, sequence: int, stream: str) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        words = st.text_input(
            "Find a token", key="tokens_find", bind="query-params", placeholder="its text", width=200
        )
        everywhere = st.toggle("in all sequences", key="tokens_everywhere", bind="query-params")
        massive_only = st.toggle("massive only", key="tokens_massive", bind="query-params")
    rows = token_rows(close_up, depth, stream=stream)
    shown = found_tokens(rows, words, sequence=None if everywhere else sequence)
    if massive_only:
        shown = shown[shown["massive"]]
    num_massive = int(rows["massive"].sum())
    if shown.empty:
        st.info(_none_words(words, massive_only, num_massive, everywhere), icon="ℹ️")
    else:
        show_frame(
            shown[[*(["sequence"] if everywhere else []), *_ORDER]],
            height=min(38 + 35 * len(shown), 470),
            column_config=_COLUMNS,
            key="tokens_table",
        )
    st.caption(escaped(_table_words(rows, shown, reading, depth, num_massive)))
    offer_csv(shown, f"tokens_depth_{depth}", key="tokens_csv")


def _none_words(words: str, massive_only: bool, num_massive: int, everywhere: bool) -> str:
    if massive_only and not num_massive:
        return "No token of the run has a massive activation at this depth."
    where = "the run" if everywhere else "this sequence; try all sequences"
    return f"No token with “{escaped(words)}” in {where}." if words else f"No such token in {where}."


def _table_words(
    rows: pd.DataFrame, shown: pd.DataFrame, reading: Reading, depth: int, num_massive: int
) -> str:
    undefined = int((~np.isfinite(rows["norm"])).sum())
    sinks = rows[rows["massive"]]
    features = ", ".join(map(str, sinks["largest feature"].value_counts().head(4).index))
    parts = [
        f"Depth {depth} of {reading.name}: {len(shown)} of {len(rows)} tokens" + ", the largest norms first.",
        f"{num_massive} have a massive activation (above 100 and 1000 × the median), in features {features}."
        if num_massive
        else "None has a massive activation (above 100 and 1000 × the median).",
        f"{undefined} are not finite." if undefined else "",
        f"{cut.capitalize()}." if (cut := cut_words(shown)) else "",
    ]
    return " ".join(filter(None, parts))


PAGE = Page(
    title="Tokens",
    url_path="tokens",
    help="Which tokens are large, similar or lost, and at which depth?",
    show=_show,
)
