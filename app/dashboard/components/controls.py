"""What may a visitor choose? The version of each number, in controls whose values are part of the URL."""

# Every control has a key and `bind="query-params"`: the key is its name in the URL, so that a copied address shows the
# same view to somebody else, and the reload of a page loses nothing.

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from depthscope.app.figures import CHOICES, Analyses, FigureKind, Selection
from depthscope.app.figures.build.values import streams_of
from depthscope.app.text.glossary import GLOSSARY

__all__ = ["CONTROLS", "choose"]


@dataclass(frozen=True)
class Control:
    """How one field of a selection is offered; its options are those of `CHOICES`.

    ``label``: above the control.
    ``term``: of the glossary, for its tooltip.
    ``words``: option → what is written on its button, where that differs.
    """

    label: str
    term: str
    words: Mapping[str, str] = field(default_factory=dict)


CONTROLS = {
    "scope": Control(
        "Scope",
        "scope",
        {"sequence": "within sequences", "data": "over all data"},
    ),
    "tokens": Control(
        "Tokens",
        "massive token",
        {"ordinary": "without massive"},
    ),
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
    """A row of controls: those that change at least one of a page's figures and have more than one option.

    ``analyses``: run name → analysis, of the chosen runs.
    ``without``: fields of `Selection` that the page decides itself.
    Returns: Fields of `Selection`; those that are not offered are missing.
    """
    used = {name for kind in kinds for name in kind.uses} - set(without)
    selection: dict[str, Any] = {}
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        for name, control in CONTROLS.items():
            if name in used:
                selection[name] = _choose_option(name, control)
        streams = streams_of(analyses)
        if "stream" in used and len(streams) > 1:
            selection["stream"] = _choose_stream(streams)
    return selection


def _choose_option(name: str, control: Control) -> str:
    return st.segmented_control(
        control.label,
        CHOICES[name],
        default=getattr(Selection(), name),
        format_func=lambda option: control.words.get(option, option),
        key=name,
        bind="query-params",
        help=GLOSSARY[control.term].meaning,
        required=True,  # a second click on the chosen option would choose none
        width="content",
    )


def _choose_stream(streams: Sequence[str]) -> str:
    words = {"mean": "mean of streams", "each": "each stream"}
    return st.selectbox(
        "Stream",
        # `streams_of` has "mean" first, which is offered here with "each".
        ["mean", "each", *streams[1:]],
        format_func=lambda option: words.get(option, f"stream {option}"),
        key="stream",
        bind="query-params",
        width=170,
    )
