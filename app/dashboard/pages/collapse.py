"""Do representations collapse across depth? Ranks and token similarity at every depth, against what noise would give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from depthscope.app.dashboard.components.chart import build
from depthscope.app.dashboard.components.choices import choose_one
from depthscope.app.dashboard.components.controls import choose, choose_section, chosen_run
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import cards_in_rows, show_in_rows, show_on_request
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import Figure, FigureKind, Lines
from depthscope.app.figures.build.share import share_of_null
from depthscope.app.figures.specification import NOISE_BASELINE

SHARE, VALUE = f"fraction of the {NOISE_BASELINE}", "value"

VERSIONS: dict[str, dict[str, str]] = {
    "raw": {"tokens": "all", "centering": "raw"},
    "centred": {"tokens": "all", "centering": "centred"},
    "without massive tokens": {"tokens": "ordinary", "centering": "raw"},
}
"""What is seen side by side, instead of behind a switch: whether a collapse is that of the mean, or of a few tokens."""


def _show(chosen: ChosenRuns) -> None:
    figures = chosen.figures("collapse")
    section = choose_section(list(dict.fromkeys(kind.section for kind in figures.values())))
    kinds = [kind for kind in figures.values() if kind.section == section]
    # In three versions side by side there is no switch for them.
    selection = choose(kinds, chosen.analyses, without=("tokens", "centering"))
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        scale = st.segmented_control(
            "Scale",
            [SHARE, VALUE],
            default=SHARE,
            key="collapse_scale",
            bind="query-params",
            required=True,
            width="content",
            help="A rank is read against that of noise of the same shape, which grows with the number of tokens.",
        )
        shown = _choose_measure([kind for kind in kinds if "run" not in kind.uses])
    curves = [kind for kind in kinds if "run" not in kind.uses]
    heat_maps = [kind for kind in kinds if "run" in kind.uses]
    drawn: dict[str, Figure] = {} if shown is None else _versions(shown, chosen, selection)
    for kind in curves:
        if kind is not shown:
            drawn[f"chart_{kind.name}"] = build(kind, chosen.analyses, selection)
    cards_in_rows({key: _scaled(figure, scale) for key, figure in drawn.items()})
    if heat_maps:
        selection["run"] = chosen_run(chosen.feeding(*(kind.needs for kind in heat_maps)))
        show_in_rows(heat_maps, chosen, selection)
    show_on_request(chosen, "collapse", section)


def _scaled(figure: Figure, scale: str) -> Figure:
    return share_of_null(figure) if scale == SHARE and isinstance(figure, Lines) else figure


def _choose_measure(curves: list[FigureKind]) -> FigureKind | None:
    """The measure that is shown in several versions; None where no curve has them."""
    able = {kind.name: kind for kind in curves if {"tokens", "centering"} & set(kind.uses)}
    if not able:
        return None
    return able[
        choose_one(
            "Raw, centred and without massive tokens",
            list(able),
            "collapse_measure",
            words=lambda name: able[name].title,
            width=340,
        )
    ]


def _versions(kind: FigureKind, chosen: ChosenRuns, selection: dict[str, Any]) -> dict[str, Figure]:
    """One measure raw, centred and without massive tokens, by the keys of their cards."""
    found = {}
    for title, choices in VERSIONS.items():
        if title == "raw" or _changes(kind, choices):
            figure = build(kind, chosen.analyses, {**selection, **choices})
            short = f"{figure.title.removesuffix(' across depth')}, {title}"
            found[f"version_{title}"] = replace(figure, title=short)
    return found


def _changes(kind: FigureKind, choices: dict[str, str]) -> bool:
    """Whether a figure is another one under these choices than in the raw version."""
    return any(name in kind.uses and value != VERSIONS["raw"][name] for name, value in choices.items())


PAGE = Page(
    title="Collapse",
    url_path="collapse",
    heading="Collapse across depth",
    help="Do tokens become equal, and does the representation use few directions?",
    question="collapse",
    missing="None of the chosen runs has states to measure.",
    show=_show,
)
