"""Which of all runs is in trouble, and with what? The verdict table of a folder, worst first; a click opens one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.live_status import LiveState
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.dashboard.state.visits import a_click_leads_on, open_microscope
from depthscope.app.readings.kept_readings import Summary, summary_of
from depthscope.app.tables.verdict_table import (
    SIGNS,
    VerdictTable,
    groupable,
    has_seeds,
    plain_attributes,
    verdict_table,
)

__all__ = ["show_verdict_board"]

# Half transparent, so that the text keeps its contrast on white and on black.
TINTS = {
    "FAIL": "rgba(224, 49, 49, 0.30)",
    "WARN": "rgba(247, 144, 9, 0.28)",
    "INFO": "rgba(51, 133, 255, 0.14)",
    "PASS": "rgba(47, 158, 68, 0.12)",
}
"""State → background of its cells; of what was not judged, none."""

PATIENCE = 2.0
"""Seconds of analysis before what is known is shown: runs that nobody has looked at yet follow."""

ROW, HEAD, MOST_HEIGHT = 35, 38, 460
"""Pixels of a row, of the head, and of the table, which scrolls."""

_KEY = "verdict_board"
_INPUT = "verdict_board_input"
_WAITED = "verdict_board_waited"

_table_keys = st.components.v2.component(
    "depthscope_table_keys", js=Path(__file__).with_name("table_keys.js").read_text(encoding="utf-8")
)


def show_verdict_board() -> None:
    """The table of every listed run. Runs that were never analysed are analysed while it is open, and join it."""
    listed = run_library.list_runs()
    if listed:  # else the page says that there is none
        runs = _Runs.of(listed)
        # A fragment runs again by itself only if it was told so when it was drawn.
        st.fragment(_board, run_every=1.0 if runs.changes else None)([runs])


@dataclass
class _Runs:
    """What is known about the listed runs."""

    listed: Mapping[str, Path]
    live: dict[str, LiveState]
    summaries: dict[str, list[Summary]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    unreadable: list[UnreadableRun] = field(default_factory=list)

    @classmethod
    def of(cls, listed: Mapping[str, Path]) -> _Runs:
        runs = cls(listed, growing_runs.live_states(listed))
        for name, path in listed.items():
            found = run_library.summaries_of(name, path)
            if found is None:
                runs.waiting.append(name)
            elif isinstance(found, UnreadableRun):
                runs.unreadable.append(found)
            else:
                runs.summaries[name] = found
        return runs

    @property
    def changes(self) -> bool:
        """Whether there will be more to show without a click."""
        return bool(self.waiting) or any(state.is_growing for state in self.live.values())

    def analyse(self) -> None:
        """Analyse waiting runs for a while."""
        if not self.waiting:
            return
        listed = self.listed
        bar = st.progress(0.0)
        end = time.monotonic() + PATIENCE
        while self.waiting and time.monotonic() < end:
            name = self.waiting.pop(0)
            done = f"{len(listed) - len(self.waiting) - 1} of {len(listed)} runs judged, now {escaped(name)}"

            def progress(metric: str, number: int, total: int, done: str = done) -> None:
                bar.progress(number / max(total, 1), f"{done}: {escaped(metric)}")

            progress("opening", 0, 1)
            found = run_library.read_run(name, listed, progress=progress)
            if isinstance(found, UnreadableRun):
                self.unreadable.append(found)
            else:
                self.summaries[name] = [summary_of(reading) for reading in found]
        bar.empty()


def _board(first: list[_Runs]) -> None:
    """Draw the table; `first` has what is known when the page is opened, and is empty whenever this runs again by itself."""
    if a_click_leads_on():
        st.rerun()  # of the whole page, which goes there: this is only a part of it
    runs = first.pop() if first else _Runs.of(run_library.list_runs())
    changed = runs.changes
    runs.analyse()
    if runs.waiting:
        st.caption(
            f"{len(runs.listed) - len(runs.waiting)} of {len(runs.listed)} runs judged; the others follow."
        )
    if runs.summaries:
        _show_table(runs.summaries, {name: state.words for name, state in runs.live.items()})
    for run in runs.unreadable:
        st.caption(f"⚠ {escaped(run.name)} cannot be read: {escaped(run.reason)}")
    if changed and not runs.changes and st.session_state.get(_WAITED):
        st.session_state[_WAITED] = False
        st.rerun()  # of the whole page: this stops the fragment's clock
    st.session_state[_WAITED] = runs.changes


def _show_table(by_run: Mapping[str, Sequence[Summary]], live: Mapping[str, str]) -> None:
    # A run of several chains has a row for each, and is opened under its own name.
    listed_as = {summary.name: name for name, found in by_run.items() for summary in found}
    summaries = [summary for found in by_run.values() for summary in found]
    grouping = _choose_grouping(summaries)
    statuses = {name: live[listed_as[name]] for name in listed_as if listed_as[name] in live}
    table = verdict_table(_found(summaries), statuses=statuses, **grouping)
    if table.cells.empty:
        st.caption("No run has a name or an attribute with these words.")
        return
    st.dataframe(
        table.cells.style.apply(_tints, table=table, axis=None),
        hide_index=True,
        height=min(HEAD + ROW * len(table.cells), MOST_HEIGHT),
        row_height=ROW,
        key=_KEY,
        on_select=lambda: None if _input() == "keys" else _open(table, listed_as),
        selection_mode="single-cell",
        alt="Verdicts of every run, the worst first: a click on a cell, or Enter, opens the run at that depth.",
    )
    _table_keys(
        data={"table": _KEY},
        key=_INPUT,
        on_by_change=lambda: None,
        on_opened_change=lambda: _open(table, listed_as),
    )
    words = ", ".join(
        f"{sign} {state.lower()}" for state, sign in SIGNS.items() if state not in ("INFO", "PASS")
    )
    st.caption(
        f"{words}, {SIGNS['INFO']} note, {SIGNS['PASS']} passed; a number is the depth. Not judged is not passed. "
        "A click on a cell, or Enter, opens the run there."
    )


def _found(summaries: list[Summary]) -> list[Summary]:
    words = str(st.session_state.get("find", "")).casefold().split()
    return [summary for summary in summaries if all(word in _searched(summary) for word in words)]


def _searched(summary: Summary) -> str:
    plain = plain_attributes(summary.attrs).values()
    told = [name for name, standing in summary.standings.items() if standing.state in ("FAIL", "WARN")]
    return " ".join(map(str, (summary.name, *plain, *told))).casefold()


def _choose_grouping(summaries: list[Summary]) -> dict[str, Any]:
    """How rows are put together, in the URL as `?find=`, `?group=` and `?seeds=`."""
    if len(summaries) < 2:
        return {}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Find", key="find", bind="query-params", placeholder="name, attribute, verdict", width=260
        )
        names = groupable(summaries)
        group = None
        if names:
            # The attribute of other runs: Streamlit raises for a value that is no option.
            if st.session_state.get("group") not in (None, *names):
                st.session_state.pop("group")
            group = st.selectbox(
                "Group by",
                names,
                index=None,
                key="group",
                bind="query-params",
                placeholder="nothing: worst first",
                width=220,
            )
        fold = has_seeds(summaries) and st.toggle("Seeds in one row", key="fold", bind="query-params")
    return {"group_by": group, "fold_seeds": bool(fold)}


def _tints(cells: pd.DataFrame, table: VerdictTable) -> pd.DataFrame:
    return table.states.map(lambda state: f"background-color: {TINTS[state]}" if state in TINTS else "")


def _input() -> str:
    """By what a cell was selected last: ``pointer`` or ``keys``."""
    return str((st.session_state.get(_INPUT) or {}).get("by") or "pointer")


def _open(table: VerdictTable, listed_as: Mapping[str, str]) -> None:
    """Open the microscope at the run and depth of the cell that is selected."""
    cells = st.session_state[_KEY]["selection"]["cells"]
    if cells:
        row, column = cells[0]
        names = table.runs[int(row)]
        open_microscope(
            [listed_as[name] for name in names],
            look_at=names[0],
            depth=table.depths[int(row)].get(str(column)),
        )
