"""What may a visitor choose? The version of each number, in controls whose values are part of the URL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import streamlit as st

from depthscope.app.figures import CHOICES, Analyses, FigureKind
from depthscope.app.figures.build.values import streams_of

__all__ = ["choose", "choose_section", "chosen_run"]

_WORDS = {
    "scope": ("Scope", {"sequence": "within sequences", "data": "over all data"}),
    "tokens": ("Tokens", {"all": "all", "ordinary": "without massive"}),
    "centering": ("Centring", {"raw": "raw", "centred": "centred"}),
    "estimator": ("Estimator", {"biased": "biased", "unbiased": "unbiased"}),
    "direction": ("Direction", {"both": "both", "forward": "forward", "backward": "backward"}),
    "reduction": ("Over tokens", {}),
    "axis": ("Axis", {"depth": "index", "relative": "relative"}),
}
_HELP = {
    "scope": "Within each sequence, averaged: do tokens become equal? Over data: are few directions used?",
    "tokens": "Massive activations dominate ranks and similarities; look without them too.",
    "centering": "Centred removes the mean token first.",
    "estimator": "Biased CKA is high for few tokens even where nothing is shared.",
    "axis": "Relative depth lines up runs of different depth.",
    "reduction": "How the numbers of single tokens become one.",
}
_DEFAULT = {"estimator": "unbiased"}


def choose(kinds: Iterable[FigureKind], analyses: Analyses) -> dict[str, Any]:
    """A row of controls: those that change at least one of a page's figures and have more than one option.

    Parameters
    ----------
    kinds : iterable of FigureKind
        Figures of the page.
    analyses : mapping
        Run name → analysis, of the chosen runs.

    Returns
    -------
    dict
        Selection of `depthscope.app.figures`.
    """
    used = {name for kind in kinds for name in kind.uses}
    selection: dict[str, Any] = {}
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        for name in _WORDS:
            if name in used:
                selection[name] = _one(name)
        if "stream" in used:
            selection["stream"] = _stream(analyses)
        if "depths" in used:
            selection["depths"] = _depths(analyses)
    return {name: value for name, value in selection.items() if value is not None}


def _one(name: str) -> str | None:
    label, words = _WORDS[name]
    options = CHOICES[name]
    return st.segmented_control(
        label,
        options,
        default=_DEFAULT.get(name, options[0]),
        format_func=lambda option: words.get(option, option),
        key=name,
        bind="query-params",
        help=_HELP.get(name),
        required=True,
        width="content",
    )


def _stream(analyses: Analyses) -> str | None:
    """Which stream; nothing to choose where no run has several."""
    streams = streams_of(analyses)
    if len(streams) < 2:
        return None
    words = {"mean": "mean of streams", "each": "each stream"}
    return st.selectbox(
        "Stream",
        ["mean", "each", *streams[1:]],
        format_func=lambda option: words.get(option, f"stream {option}"),
        key="stream",
        bind="query-params",
        width=170,
    )


def _depths(analyses: Analyses) -> tuple[int, ...] | None:
    """Depths whose spectra are shown; none chosen leaves the figure's own."""
    last = max((data.sizes.get("depth", 1) for data in analyses.values()), default=1) - 1
    chosen = st.multiselect(
        "Depths",
        range(last + 1),
        key="depths",
        bind="query-params",
        placeholder="five from first to last",
        width=260,
    )
    return tuple(sorted(chosen)) or None


def choose_section(sections: Sequence[str]) -> str:
    """Which of a page's sections is shown, in the URL as `?part=`.

    Parameters
    ----------
    sections : sequence of str
        At least one.

    Returns
    -------
    str
    """
    if st.session_state.get("part") not in sections:
        st.session_state.pop("part", None)  # of another page, or of other runs
    return st.segmented_control(
        "Part",
        sections,
        default=sections[0],
        key="part",
        bind="query-params",
        required=True,
        label_visibility="collapsed",
    )


def chosen_run(names: list[str], label: str = "Run of the heat maps") -> str:
    """The run that heat maps show, in the URL as `?run=`.

    Parameters
    ----------
    names : list of str
        Runs that can feed them; at least one.
    label : str
        Label of the control.

    Returns
    -------
    str
    """
    if len(names) == 1:
        return names[0]
    return st.selectbox(label, names, key="run", bind="query-params", width=260)
