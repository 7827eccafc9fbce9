"""Where in the network does the signal die? Every run over its depth as a row of one map, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chart import component, offer_numbers
from depthscope.app.dashboard.components.controls import choose_one
from depthscope.app.dashboard.components.finding_card import BADGES, escaped, show_card
from depthscope.app.dashboard.components.page import LOOKED_AT, Page, explain_none
from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.chosen_runs import a_click_leads_on, open_microscope, open_page
from depthscope.app.dashboard.state.growing_runs import LiveState
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.readings.depth_map import MEASURES, PlacedFinding, Summary, groupable, plain_attributes
from depthscope.app.tables.findings import cards_for
from depthscope.app.text.cards import ABOUT_THE_READING, card_of
from depthscope.app.text.numbers import UNDEFINED, number
from depthscope.app.text.visible import visible
from depthscope.diagnostics.experiments import results_beside

MOST_CARDS = 3
"""Findings of the chosen row that are shown at once: more columns leave too few words in a line."""

WORST_FIRST = "nothing: worst first"

_KEY, _WAITED = "depth_map", "depth_map_waited"

_map_component = component("depth_map", "numbers", "back")


@dataclass
class _Runs:
    """What is known about the listed runs."""

    listed: Mapping[str, Path]
    live: dict[str, LiveState]
    summaries: dict[str, Summary] = field(default_factory=dict)
    # Of each summary: a run of several chains has several.
    listed_as: dict[str, str] = field(default_factory=dict)
    unreadable: list[UnreadableRun] = field(default_factory=list)

    @classmethod
    def of(cls, listed: Mapping[str, Path]) -> _Runs:
        runs = cls(listed, growing_runs.live_states(listed))
        for name, path in listed.items():
            found = run_library.summaries_of(name, path, ask=True)
            if isinstance(found, UnreadableRun):
                runs.unreadable.append(found)
            else:
                runs.summaries |= {each.name: each for each in found}
                runs.listed_as |= {each.name: name for each in found}
        return runs

    @property
    def changes(self) -> bool:
        """Whether there will be more to show without a click."""
        return any(each.waits for each in self.unreadable) or any(
            state.is_growing for state in self.live.values()
        )

    def status(self, name: str) -> str:
        """What a run is that is or was written step by step."""
        state = self.live.get(self.listed_as[name])
        return "" if state is None else state.words


def _show() -> None:
    listed = run_library.list_runs()
    if not listed:
        explain_none()
        return
    runs = _Runs.of(listed)
    # A fragment runs again by itself only if it was asked to when it was drawn. Hundreds of rows take tenths of a second.
    seconds = max(1.0, len(listed) / 100)
    st.fragment(_draw, run_every=seconds if runs.changes else None)([runs])


def _draw(first: list[_Runs]) -> None:
    """Draw the map; `first` has what is known when the page is opened, and is empty whenever this runs again by itself."""
    if a_click_leads_on():
        st.rerun()  # of the whole page, which goes there: this is only a part of it
    runs = first.pop() if first else _Runs.of(run_library.list_runs())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        measure = choose_one(
            "Colour", list(MEASURES), "colour", words=lambda name: MEASURES[name].title, width=330
        )
        wanted, group_by = _choose_rows(list(runs.summaries.values()), len(runs.listed))
    shown = [
        each for each in runs.summaries.values() if _is_found(wanted, _searched(each, runs.status(each.name)))
    ]
    shown.sort(key=lambda each: (_group(each, group_by), each.badness))
    others = [
        (each.name, each.reason if each.waits else f"⚠ cannot be read: {each.reason}")
        for each in sorted(runs.unreadable, key=lambda each: each.waits)
    ]
    others = [(name, words) for name, words in others if _is_found(wanted, f"{name} {words}")]
    if shown or others:
        _show_map(runs, shown, others, measure, group_by)
    else:
        st.caption("No run has these words in its name, attributes, findings or state.")
    if not runs.changes and st.session_state.get(_WAITED):
        st.session_state[_WAITED] = False
        st.rerun()  # of the whole page: this stops the fragment's clock
    st.session_state[_WAITED] = runs.changes


def _choose_rows(summaries: Sequence[Summary], num_runs: int) -> tuple[list[str], str]:
    """The words that a row must have, and the attribute by which rows are grouped: in the URL as `?find=` and `?group=`."""
    if num_runs < 2:
        return [], ""
    find = st.text_input(
        "Find", key="find", bind="query-params", placeholder="name, attribute, finding, nan", width=260
    )
    names = groupable(summaries)
    group = choose_one("Group by", [WORST_FIRST, *names], "group", width=220) if names else WORST_FIRST
    return (find or "").casefold().split(), "" if group == WORST_FIRST else group


def _is_found(wanted: Sequence[str], text: str) -> bool:
    return all(word in text.casefold() for word in wanted)


def _searched(summary: Summary, status: str) -> str:
    """Everything that the page shows of a run."""
    attributes = [f"{name} {value}" for name, value in plain_attributes(summary.attrs).items()]
    findings = [
        f"{mark.finding.verdict.replace('_', ' ')} {BADGES[mark.finding.severity.name][0]} {mark.finding.sentence}"
        for mark in summary.marks
    ]
    return " ".join([summary.name, status, *attributes, *findings])


def _group(summary: Summary, group_by: str) -> str:
    return str(plain_attributes(summary.attrs).get(group_by, "–")) if group_by else ""


def _show_map(
    runs: _Runs, shown: Sequence[Summary], others: Sequence[tuple[str, str]], measure: str, group_by: str
) -> None:
    rows = [_row(each, measure, runs.status(each.name), _group(each, group_by)) for each in shown]
    rows += [{"name": name, "worst": visible(words), "cells": None, "alt": ""} for name, words in others]
    names = [row["name"] for row in rows]
    asked = st.query_params.get("at", "")
    at = asked if asked in names else names[0]
    st.session_state[LOOKED_AT] = runs.listed_as.get(at)
    about = MEASURES[measure]
    _map_component(
        data={
            "name": _KEY,
            "what": "map",
            "measure": about.title,
            "limits": about.limits,
            "ends": about.ends,
            "twoSided": about.is_two_sided,
            "group": group_by,
            "rows": rows,
            "at": at,
            "caption": f"{about.title} of every run over its depth, the worst run first. Up and down go from row to row, left "
            "and right along the depth, Enter opens the microscope there, space marks the run for a comparison.",
        },
        key=_KEY,
        on_at_change=_put_at,
        on_open_change=lambda: _open(runs),
        on_together_change=lambda: _open_together(runs),
    )
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        waits = any(each.waits for each in runs.unreadable)
        judged = f"{len(runs.summaries)} of {len(runs.listed)} runs analysed. " if waits else ""
        st.caption(
            f"{judged}▼ a finding begins there (red: failure, orange: warning, blue: note). Click a row's map to open the "
            "microscope at that depth, its name to read its findings below.",
            width="content",
        )
        offer_numbers("Numbers", lambda: _numbers(shown, measure), f"depth_map_{measure}", key="map")
    if at in runs.summaries:
        _show_findings(runs, runs.summaries[at])


def _row(summary: Summary, measure: str, status: str, group: str) -> dict[str, Any]:
    """One row for the browser."""
    cells, block = summary.cells(measure)
    worst = card_of(summary.marks[0].finding) if summary.marks else None
    title = f"{worst.title.rstrip('.')} · {worst.where}" if worst else "nothing found"
    return {
        "name": summary.name,
        "status": status,
        "group": group,
        "severity": worst.severity if worst else "PASS",
        "sign": BADGES[worst.severity][2] if worst else "✓",
        "worst": visible(title),
        "loss": "" if summary.loss is None else number(summary.loss),
        "cells": cells,
        "block": block,
        "names": [visible(name) for name in summary.depths],
        "missing": "" if cells else MEASURES[measure].missing,
        "marks": [
            {
                "at": mark.first,
                "severity": mark.finding.severity.name,
                "title": visible(card_of(mark.finding).title.rstrip(".")),
            }
            for mark in summary.marks
            if mark.first is not None
        ],
        "depth": summary.marks[0].worst if summary.marks else None,
        "alt": f"{summary.name}: {title}. {_profile_words(summary, measure)}",
    }


def _profile_words(summary: Summary, measure: str) -> str:
    """What a row shows, for those who do not see it."""
    values = np.array(summary.profiles.get(measure, ()), dtype=float)
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return f"{MEASURES[measure].title}: not measured."
    low, high = known[np.argmin(values[known])], known[np.argmax(values[known])]
    gaps = f", undefined at {len(values) - len(known)} depths" if len(known) < len(values) else ""
    return (
        f"{MEASURES[measure].title} at {len(values)} depths: {number(values[known[0]])} at first, "
        f"{number(values[known[-1]])} at last, smallest {number(values[low])} at depth {low}, "
        f"largest {number(values[high])} at depth {high}{gaps}."
    )


def _numbers(shown: Sequence[Summary], measure: str) -> pd.DataFrame:
    """The numbers of the map."""
    return pd.DataFrame(
        {
            "run": each.name,
            "loss": each.loss,
            "depth": depth,
            "module": each.depths[depth] if depth < len(each.depths) else UNDEFINED,
            MEASURES[measure].title: value,
        }
        for each in shown
        for depth, value in enumerate(each.profiles.get(measure, ()))
    )


def _show_findings(runs: _Runs, summary: Summary) -> None:
    """The findings of the row of the cursor, the worst ones in columns and the others folded."""
    st.markdown(f"## {escaped(summary.name)}")
    if not summary.marks:
        st.markdown("The signal passes: no metric crossed its threshold.")
    listed_as = runs.listed_as[summary.name]
    path = runs.listed[listed_as]
    results = results_beside(path, *(summary.attrs.get(of) for of in ("weights_digest", "data_digest")))

    def show(marks: Sequence[PlacedFinding]) -> None:
        for mark, card in zip(
            marks, cards_for([each.finding for each in marks], str(path), results), strict=True
        ):
            show_card(card, name=summary.name, depth=mark.worst, runs=[listed_as])

    worst, more = summary.marks[:MOST_CARDS], summary.marks[MOST_CARDS:]
    for column, mark in zip(st.columns(max(len(worst), 1)), worst, strict=False):
        with column:
            show([mark])
    if more:
        with st.expander(f"{len(more)} more"):
            show(more)
    # What could not be proved is no finding about the network.
    if summary.others:
        titles = " · ".join(escaped(card_of(mark.finding).title.rstrip(".")) for mark in summary.others)
        with st.expander(f"{ABOUT_THE_READING}: {titles}"):
            show(summary.others)


def _put_at() -> None:
    at = (st.session_state.get(_KEY) or {}).get("at")
    if isinstance(at, str):
        st.query_params["at"] = at


def _open(runs: _Runs) -> None:
    """Open the microscope at the run and depth of what was clicked."""
    asked = (st.session_state.get(_KEY) or {}).get("open") or {}
    name, depth = asked.get("run"), asked.get("depth")
    if name in runs.listed_as:
        open_microscope(
            [runs.listed_as[name]],
            look_at=name,
            depth=int(depth) if isinstance(depth, (int, float)) else None,
        )


def _open_together(runs: _Runs) -> None:
    """Open a page for the marked runs."""
    asked = (st.session_state.get(_KEY) or {}).get("together") or {}
    names = [runs.listed_as[name] for name in asked.get("names", ()) if name in runs.listed_as]
    if names and asked.get("page") in ("compare", "training"):
        open_page(asked["page"], names)


PAGE = Page(
    title="Home",
    url_path="",
    help="Where in the network does the signal vanish, explode or collapse?",
    show_all=_show,
)
