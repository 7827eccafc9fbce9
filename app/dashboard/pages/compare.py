"""How do runs differ, and is it more than chance? Curves at the same relative depth, and tests of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import card
from depthscope.app.dashboard.components.choices import choose_index, choose_one
from depthscope.app.dashboard.components.controls import choose
from depthscope.app.dashboard.components.legend import show_legend
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.reading_cache import ReadingCache
from depthscope.app.figures import FIGURES, FigureKind, Line, Lines, Selection
from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.kept_differences import keep_differences, kept_differences
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.comparison import comparison_table, differences
from depthscope.app.tables.differences import (
    ONE_RUN_EACH,
    between_groups,
    between_runs,
    clearest,
    difference_figure,
    differences_at,
    in_words,
)
from depthscope.app.text.terminal import command_line
from depthscope.app.text.visible import visible
from depthscope.diagnostics import CATALOGUE, SchemaError
from depthscope.diagnostics.analysis.differences import Difference

FIRST = "effective_rank"
"""The figure that is compared at first, where the runs feed it."""

SEED = "seed"

QUICK_BYTES = 20 * 2**20
"""Of the files of the runs: they are tested in about a second, larger ones when it is asked for. A heuristic of ours."""

_tested = ReadingCache(32 * 2**20, lambda found: sum(each.value.nbytes * 4 for each in found) + 1000)
"""A test measures every sequence of two runs, which takes seconds; it is kept until a file changes."""


def comparable(chosen: ChosenRuns) -> list[str]:
    """Figures of one number along depth or connections that a chosen run feeds."""
    return [
        name
        for name, kind in FIGURES.items()
        if isinstance(kind, CurveFigure)
        and CATALOGUE[kind.metric].axis in ("depth", "connection")
        and chosen.feeding(kind.needs)
    ]


def _show(chosen: ChosenRuns) -> None:
    names = comparable(chosen)
    if not names:
        st.info(
            "None of the chosen runs has a number along its depth: there is nothing to compare.", icon="ℹ️"
        )
        return
    readings = list(chosen.readings.values())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = choose_one(
            "Measure", names, "measure_of", default=FIRST, words=lambda each: FIGURES[each].title, width=340
        )
        by = _choose_group(readings)
    kind = FIGURES[name]
    selection = {**choose([kind], chosen.analyses, without=("axis",)), "axis": "relative"}
    curves = kind.build(chosen.analyses, **{key: selection[key] for key in selection if key in kind.uses})
    assert isinstance(curves, Lines)
    show_legend(chosen.analyses)
    left, right = st.columns(2, gap="medium")
    with left:
        shown = curves if by is None else folded(curves, {r.name: str(r.attrs.get(by)) for r in readings})
        card(shown, key="compare_curves", height=340)
    for warning in differences(readings):
        st.caption(f"⚠ {escaped(warning)}")
    _show_table(readings, kind, selection)
    # Last: a test that was not made yet takes seconds, and what is above can be read meanwhile.
    with right:
        if len(readings) < 2:
            st.info(
                "One run is chosen. Choose a second one at the side: their differences are tested here.",
                icon="👈",
            )
        else:
            _show_differences(readings, kind, selection, by)


def _choose_group(readings: Sequence[Reading]) -> str | None:
    """The attribute whose groups are compared instead of single runs; None for single runs."""
    names = groups_of(readings)
    if not names:
        return None
    single = "single runs"
    chosen = choose_one(
        "Compare", [single, *names], "compare_by", words=lambda n: n if n == single else f"by {n}"
    )
    return None if chosen == single else chosen


def groups_of(readings: Sequence[Reading]) -> list[str]:
    """Attributes that make groups of the runs, of which at least one has several runs, such as the seeds of a family."""
    shared = set.intersection(*(set(reading.attrs) for reading in readings)) if readings else set()
    found = []
    for name in sorted(shared - {SEED, "created", "data_digest", "weights_digest"}):
        values = [reading.attrs[name] for reading in readings]
        if all(isinstance(value, (str, int, float)) for value in values):
            different = set(map(str, values))
            if 1 < len(different) < len(values):
                found.append(name)
    return found


def folded(figure: Lines, group_of: Mapping[str, str]) -> Lines:
    """The measured curves of a group as one: their mean, and a band from the smallest to the largest.

    ``figure``: one curve of each run, at relative depths.
    Returns: Groups whose runs are not equally deep are left as they are.
    """
    lines: list[Line] = []
    measured = [line for line in figure.lines if line.role == "measured"]
    # Of several curves of a run, such as forward and backward, each is folded with its like.
    labels = {id(line): line.label.removeprefix(line.group).removeprefix(" · ") for line in measured}
    kinds = dict.fromkeys((group_of.get(line.group, line.group), labels[id(line)]) for line in measured)
    for group, label in kinds:
        members = [
            line
            for line in measured
            if (group_of.get(line.group, line.group), labels[id(line)]) == (group, label)
        ]
        if len({line.y.shape for line in members}) > 1 or len(members) == 1:
            lines += members
            continue
        stack = np.stack([line.y for line in members])
        known = np.isfinite(stack).any(axis=0)
        low, high = (
            np.where(known, reduce(np.where(np.isfinite(stack), stack, fill), axis=0), np.nan)
            for reduce, fill in ((np.min, np.inf), (np.max, -np.inf))
        )
        counts = np.isfinite(stack).sum(axis=0)
        mean = np.where(known, np.nansum(stack, axis=0) / np.maximum(counts, 1), np.nan)
        name = f"{group}, {len(members)} runs"
        lines.append(
            Line(
                members[0].x,
                mean,
                f"{name} · {label}" if label else name,
                lower=low,
                upper=high,
                group=group,
                text=members[0].text,
            )
        )
    words = "Each line is the mean of the runs of a group; its band reaches from the smallest to the largest of them."
    thresholds = [line for line in figure.lines if line.role == "threshold"]
    return replace(figure, lines=(*lines, *thresholds), caption=f"{words} {figure.caption}", missing=())


def _differences(
    readings: Sequence[Reading], kind: FigureKind, selection: Mapping[str, str], by: str | None
) -> list[Difference] | None:
    """The tested differences; None where the visitor has not asked for the test yet, or it is not possible."""
    view = Selection.of({key: value for key, value in selection.items() if key != "axis"})
    is_known = by is not None or _is_quick(readings, kind.metric, view)
    if not is_known:
        st.info("Not tested yet; the test measures every sequence (about 5 s)", icon="ℹ️")
        if not st.button("Test the differences", key=f"test_{kind.name}"):
            return None
    try:
        with st.spinner(f"Testing {CATALOGUE[kind.metric].label}, sequence by sequence …"):
            found = _test(readings, kind.metric, view, by)
    except (ValueError, OSError, SchemaError) as error:
        st.info(f"The differences cannot be tested: {escaped(error)}", icon="ℹ️")
        return None
    if not is_known:
        st.rerun()  # now they are known, and the question goes
    return found


def _show_differences(
    readings: Sequence[Reading], kind: FigureKind, selection: Mapping[str, str], by: str | None
) -> None:
    found = _differences(readings, kind, selection, by)
    if found is None:
        return
    if not found:
        st.info(
            "No difference can be tested for this measure: it is no mean over sequences, or the runs have no states of "
            "single sequences.",
            icon="ℹ️",
        )
        return
    figure = difference_figure(found, kind.title)
    card(figure, key="compare_differences", height=340)
    axis = str(found[0].value.dims[0])
    last = max(each.value.size for each in found) - 1
    at = choose_index(
        f"At {axis} of the shallower run", last, "compare_at", default=clearest(found), width=220
    )
    shown = differences_at(found, at).map(escaped).rename(columns=escaped)
    st.table(shown.set_index("difference"), border="horizontal")
    for each in found:
        st.markdown(f"- {escaped(in_words(each))}")
    if by is None:
        st.caption(ONE_RUN_EACH)
    paths = [Path(path) for path in dict.fromkeys(reading.path for reading in readings)]
    extra = ["--by", by] if by else []
    command = command_line("compare", *paths, "--metrics", kind.metric, *extra)
    st.code(visible(command), "bash", wrap_lines=True)


def _is_quick(readings: Sequence[Reading], metric: str, view: Selection) -> bool:
    """Whether a test is known already, or takes no longer than a visitor waits."""
    try:
        if _tested.peek(_key(readings, metric, view)) is not None:
            return True
        if kept_differences(_versions(readings), f"{metric} {view}") is not None:
            return True
        paths = [Path(reading.path) for reading in readings]
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        return sum(file.stat().st_size for file in files) < QUICK_BYTES
    except OSError:
        return False


def _key(readings: Sequence[Reading], metric: str, view: Selection) -> tuple[Any, ...]:
    return (tuple(_versions(readings).items()), metric, view)


def _versions(readings: Sequence[Reading]) -> dict[Path, FileVersion]:
    return {path: FileVersion.of(path) for path in dict.fromkeys(Path(each.path) for each in readings)}


def _test(readings: Sequence[Reading], metric: str, view: Selection, by: str | None) -> list[Difference]:
    if by is not None:
        return between_groups(readings, [metric], view, by=by)
    versions, question = _versions(readings), f"{metric} {view}"

    def kept_or_tested() -> list[Difference]:
        found = kept_differences(versions, question)
        if found is None:
            found = between_runs([str(path) for path in versions], [metric], view)
            keep_differences(versions, question, found)
        return found

    return _tested.get(_key(readings, metric, view), kept_or_tested)


def _show_table(readings: Sequence[Reading], kind: FigureKind, selection: Mapping[str, str]) -> None:
    view = Selection.of({key: value for key, value in selection.items() if key != "axis"})
    try:
        table = comparison_table(readings, [kind.metric], view)
    except ValueError:  # no run has it in this version, and the curves above say so
        return
    with st.container(border=True):
        st.markdown("## Side by side at the same relative depth")
        printed = table.printed.rename(columns=lambda name: escaped(name)).map(escaped)
        st.table(printed.set_index(printed.columns[1]).drop(columns=printed.columns[0]), border="horizontal")
        st.caption(escaped(table.caption))


PAGE = Page(
    title="Compare",
    url_path="compare",
    help="How do the chosen runs differ at the same relative depth, and is it more than chance?",
    show=_show,
)
