"""What may a visitor choose? The version of each number, in controls whose values are part of the URL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import streamlit as st

from depthscope.app.figures import CHOICES, Analyses, FigureKind, Selection
from depthscope.app.figures.build.values import streams_of
from depthscope.app.readings.readings import Reading
from depthscope.app.text.glossary import GLOSSARY


class Control(NamedTuple):
    """How one field of a selection is offered; its options are those of `CHOICES`."""

    label: str  # above the control
    term: str  # of the glossary, for its tooltip
    words: Mapping[str, str] = {}  # option → what is written on its button, where that differs


CONTROLS = {
    "scope": Control("Scope", "scope", {"sequence": "within sequences", "data": "over all data"}),
    "tokens": Control("Tokens", "massive token", {"ordinary": "without massive"}),
    "centering": Control("Centring", "centring"),
    "estimator": Control("Estimator", "estimator"),
    "direction": Control("Direction", "direction"),
    "reduction": Control("Over tokens", "reduction"),
    "axis": Control("Axis", "relative depth", {"depth": "index"}),
}
"""Controls by field of `Selection`, in their order on a page."""


def choose(
    kinds: Iterable[FigureKind], analyses: Analyses, *, without: Collection[str] = ()
) -> dict[str, Any]:
    """Controls that change one of a page's figures and have several options; others are missing in the result."""
    used = {name for kind in kinds for name in kind.uses} - set(without)
    selection: dict[str, Any] = {}
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        for name in (name for name in CONTROLS if name in used):
            control = CONTROLS[name]
            selection[name] = st.segmented_control(
                control.label,
                CHOICES[name],
                default=getattr(Selection(), name),
                format_func=lambda option, words=control.words: words.get(option, option),
                key=name,
                bind="query-params",
                help=GLOSSARY[control.term].meaning,
                required=True,  # a second click on the chosen option would choose none
                width="content",
            )
        streams = streams_of(analyses)
        if "stream" in used and len(streams) > 1:
            # `streams_of` has "mean" first, which is offered here with "each".
            words = {"mean": "mean of streams", "each": "each stream"}
            selection["stream"] = choose_one(
                "Stream",
                ["mean", "each", *streams[1:]],
                "stream",
                words=lambda option: words.get(option, f"stream {option}"),
                width=170,
            )
    return selection


SINGLE_RUNS = "single runs"


def choose_one(
    label: str,
    options: Sequence[str],
    key: str,
    *,
    default: str | None = None,
    words: Callable[[str], str] = str,
    width: int = 240,
) -> str:
    """One of some names, in the URL under its key.

    ``options``: at least one; a single one is taken without asking.
    ``key``: of the control and in the URL.
    ``default``: chosen at first; the first option where it is None or no option.
    """
    # A name of other runs, or of a link: Streamlit raises for a value that is no option.
    if st.session_state.get(key) not in options:
        st.session_state.pop(key, None)
    if len(options) == 1:
        return options[0]
    index = options.index(default) if default is not None and default in options else 0
    return st.selectbox(
        label, options, index=index, format_func=words, key=key, bind="query-params", width=width
    )


# Streamlit binds a list to the address by the words that are shown; names are shorter, and stay when a title changes.
def choose_names(
    label: str, options: Sequence[str], default: Sequence[str], *, key: str, words: dict[str, str], most: int
) -> list[str]:
    """Some of many names, in the address under their key; the default where none is chosen."""
    known = set(options)
    asked = st.query_params.get_all(key)[: 2 * most] if key in st.query_params else []
    named = [name for name in dict.fromkeys(asked) if name in known][:most]
    if key not in st.session_state:
        st.session_state[key] = named or list(default)
    elif not set(st.session_state[key]) <= known:
        # Chosen for another run: Streamlit raises for a value that is no option.
        st.session_state[key] = [name for name in st.session_state[key] if name in known]
    if asked and not named:
        del st.query_params[key]
    st.multiselect(
        label,
        options,
        format_func=words.__getitem__,
        key=key,
        max_selections=most,
        on_change=lambda: st.query_params.update({key: st.session_state[key]}),
    )
    return list(st.session_state[key][:most]) or list(default)


def choose_group(readings: Sequence[Reading], label: str, key: str) -> tuple[str | None, dict[str, str]]:
    """The attribute whose groups are shown, and the group of each run; None and no groups for single runs.

    An attribute makes groups where at least one of them has several runs, such as the seeds of a family.
    """
    shared = set.intersection(*(set(reading.attrs) for reading in readings)) if readings else set()
    names = []
    for name in sorted(shared - {"seed", "created", "data_digest", "weights_digest"}):
        values = [reading.attrs[name] for reading in readings]
        is_plain = all(isinstance(value, (str, int, float)) for value in values)
        if is_plain and 1 < len(set(map(str, values))) < len(values):
            names.append(name)
    words = {SINGLE_RUNS: SINGLE_RUNS} | {name: f"by {name}" for name in names}
    by = choose_one(label, list(words), key, words=words.__getitem__, width=200) if names else SINGLE_RUNS
    if by == SINGLE_RUNS:
        return None, {}
    return by, {reading.name: str(reading.attrs[by]) for reading in readings}
