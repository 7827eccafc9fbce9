"""Which of all runs is in trouble, and with what? The verdict table of a folder, worst first, and the card of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from depthscope.app.dashboard.components.chart import component
from depthscope.app.dashboard.components.chosen_runs import LOOKED_AT
from depthscope.app.dashboard.components.finding_card import BADGES, show_card
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.live_status import LiveState
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.dashboard.state.visits import a_click_leads_on, open_microscope, open_page
from depthscope.app.readings.kept_readings import Summary
from depthscope.app.readings.standings import DOES_NOT_APPLY, NOT_JUDGED, Standing
from depthscope.app.tables.tables import spoken
from depthscope.app.tables.verdict_table import (
    MILD,
    OTHERS,
    SIGNS,
    VerdictTable,
    groupable,
    has_seeds,
    plain_attributes,
    verdict_table,
)
from depthscope.app.text.cards import card_of
from depthscope.app.text.health import healthy_name
from depthscope.app.text.notebook import card_style
from depthscope.app.text.sparkline import curve_svg
from depthscope.app.text.visible import visible

__all__ = ["show_verdict_board"]

MOST_HEIGHT = 560
"""Pixels of the table, which scrolls."""

STATES = {
    **{state: words for state, (words, _, _) in BADGES.items()},
    "PASS": "passed",
    NOT_JUDGED: "not judged",
    DOES_NOT_APPLY: "does not apply",
}
"""What a state is called."""

_KEY = "verdict_board"
_WAITED = "verdict_board_waited"

_board_component = component("board", "back", more_css=card_style())


def show_verdict_board() -> None:
    """The table of every listed run. Runs that were never analysed are analysed by other processes, and fill their rows."""
    listed = run_library.list_runs()
    if listed:  # else the page shows that there is none
        runs = _Runs.of(listed)
        # A fragment runs again by itself only if it was asked to when it was drawn.
        # Hundreds of rows take tenths of a second to look at and to send.
        seconds = max(1.0, len(listed) / 100)
        st.fragment(_board, run_every=seconds if runs.changes else None)([runs])


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
        known = {name: run_library.summaries_of(name, path) for name, path in listed.items()}
        wanted = {name: listed[name] for name, found in known.items() if found is None}
        run_library.ask_for(wanted)
        known |= {name: run_library.summaries_of(name, path) for name, path in wanted.items()}
        for name, found in known.items():
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


def _board(first: list[_Runs]) -> None:
    """Draw the table; `first` has what is known when the page is opened, and is empty whenever this runs again by itself."""
    if a_click_leads_on():
        st.rerun()  # of the whole page, which goes there: this is only a part of it
    runs = first.pop() if first else _Runs.of(run_library.list_runs())
    _show_table(runs)
    if not runs.changes and st.session_state.get(_WAITED):
        st.session_state[_WAITED] = False
        st.rerun()  # of the whole page: this stops the fragment's clock
    st.session_state[_WAITED] = runs.changes


def _show_table(runs: _Runs) -> None:
    # A run of several chains has a row for each, and is opened under its own name.
    listed_as = {summary.name: name for name, found in runs.summaries.items() for summary in found}
    summaries = [summary for found in runs.summaries.values() for summary in found]
    grouping = _choose_grouping(summaries, len(runs.listed))
    statuses = {name: runs.live[of].words for name, of in listed_as.items() if of in runs.live}
    wanted = str(st.session_state.get("find", "")).casefold().split()
    table = verdict_table(
        [each for each in summaries if _is_found(wanted, _searched(each, statuses))],
        statuses=statuses,
        **grouping,
    )
    others = [
        *(
            (each.name, each.reason if each.waits else f"⚠ cannot be read: {each.reason}")
            for each in runs.unreadable
        ),
        *((name, _waiting_words(runs.listed[name])) for name in runs.waiting),
    ]
    columns = [name for name in table.cells.columns if name in table.verdicts or name == OTHERS]
    rows = [_row(table, number) for number in range(len(table.runs))]
    rows += [
        _plain_row(name, words, len(columns))
        for name, words in others
        if _is_found(wanted, f"{name} {words}")
    ]
    if not rows:
        st.caption("No run has these words in its name, attributes, findings or state.")
        return
    at = _looked_at(rows)
    st.session_state[LOOKED_AT] = next(
        (listed_as.get(row["runs"][0]) for row in rows if row["name"] == at), None
    )
    _board_component(
        data={
            "name": _KEY,
            "what": "board",
            "columns": columns,
            "groups": [grouping["group_by"]] if grouping.get("group_by") else [],
            "rows": rows,
            "runs": list(listed_as),
            "chosen": [name for name, of in listed_as.items() if of in st.session_state.get("runs", ())],
            "at": at,
            "states": STATES,
            "height": MOST_HEIGHT,
            "caption": "Verdicts of every run, the worst first. Up and down go from row to row, left and right to what can be "
            "opened, Enter opens the microscope, space marks the run for a comparison.",
        },
        key=_KEY,
        on_at_change=_put_at,
        on_open_change=lambda: _open(table, listed_as),
        on_together_change=lambda: _open_together(listed_as),
    )
    signs = ", ".join(f"{sign} {STATES[state]}" for state, sign in SIGNS.items())
    judged = f"{len(runs.summaries)} of {len(runs.listed)} runs judged. " if runs.waiting else ""
    st.caption(
        f"{judged}{signs}; a number is a depth. ↑ ↓ walk the rows; a click on a finding, or Enter, opens the microscope there."
    )
    _show_looked_at(table, at)


def _waiting_words(path: Path) -> str:
    progress = run_library.progress_of(path)
    return "waiting for its analysis" if progress is None else f"being analysed: {progress}"


def _row(table: VerdictTable, number: int) -> dict[str, Any]:
    """One row for the browser."""
    cells, states, depths = table.cells.iloc[number], table.states.iloc[number], table.depths[number]
    worst = table.worst[number]
    finding = worst.finding if worst is not None else None
    card = card_of(finding) if finding is not None else None
    return {
        "name": table.runs[number][0] if len(table.runs[number]) == 1 else cells["run"],
        "runs": table.runs[number],
        "judged": True,
        "status": str(cells.get("status", "")),
        "group": str(cells.iloc[1 + ("status" in cells)]) if len(cells) > 1 else "",
        "sentence": f"{card.title.rstrip('.')} · {card.where}" if card else "Nothing found",
        "why": card.why if card else "",
        "severity": card.severity if card else "PASS",
        "sign": SIGNS[card.severity if card else "PASS"],
        "curve": str(curve_svg(finding)) if finding is not None else "",
        "depth": worst.depth if worst is not None else None,
        "cells": [
            {
                "text": str(cells[name]),
                "state": str(states[name]) if name in table.verdicts else "",
                "mild": states[name] in MILD,
                "depth": depths.get(name),
                "place": str(cells[name])[1:].strip(),
            }
            for name in cells.index
            if name in table.verdicts or name == OTHERS
        ],
    }


def _plain_row(name: str, words: str, columns: int) -> dict[str, Any]:
    """A run without verdicts: it waits, or cannot be read."""
    return {
        "name": name,
        "runs": [name],
        "judged": False,
        "status": "",
        "group": "",
        "sentence": visible(words),
        "cells": [{"text": "", "state": ""}] * columns,
    }


def _looked_at(rows: Sequence[Mapping[str, Any]]) -> str:
    """The row whose card is open: that of the cursor, else the worst one."""
    names = [row["name"] for row in rows]
    asked = st.query_params.get("at", "")
    return asked if asked in names else str(names[0])


def _put_at() -> None:
    at = (st.session_state.get(_KEY) or {}).get("at")
    if isinstance(at, str):
        st.query_params["at"] = at


def _show_looked_at(table: VerdictTable, at: str) -> None:
    """The worst finding of one run: without a choice of runs the page begins with an answer."""
    names = [row[0] if len(row) == 1 else table.cells["run"].iloc[i] for i, row in enumerate(table.runs)]
    if at not in names or (st.session_state.get("runs") and "at" not in st.query_params):
        return
    worst = table.worst[names.index(at)]
    st.markdown(f"## {escaped(at)}")
    if worst is None or worst.finding is None:
        st.markdown("The signal passes: no metric crossed its threshold.")
    else:
        show_card(card_of(worst.finding), name=at)


def _is_found(wanted: Sequence[str], text: str) -> bool:
    return all(word in text.casefold() for word in wanted)


def _searched(summary: Summary, statuses: Mapping[str, str]) -> str:
    """Everything that the page shows of a run."""
    attributes = [f"{name} {value}" for name, value in plain_attributes(summary.attrs).items()]
    return " ".join(
        [summary.name, statuses.get(summary.name, ""), *attributes]
        + [_verdict_words(name, each) for name, each in summary.standings.items() if each.state not in MILD]
    )


def _verdict_words(name: str, standing: Standing) -> str:
    sentence = standing.finding.sentence if standing.finding is not None else ""
    return f"{spoken(name)} {healthy_name(name)} {STATES[standing.state]} {standing.state} {sentence}"


def _choose_grouping(summaries: list[Summary], num_runs: int) -> dict[str, Any]:
    """How rows are put together, in the URL as `?find=`, `?group=` and `?fold=`."""
    if num_runs < 2:
        return {}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Find", key="find", bind="query-params", placeholder="name, attribute, finding, nan", width=260
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


def _open(table: VerdictTable, listed_as: Mapping[str, str]) -> None:
    """Open the microscope at the run and depth of what was clicked."""
    asked = (st.session_state.get(_KEY) or {}).get("open") or {}
    for number, names in enumerate(table.runs):
        if asked.get("run") in (names[0], table.cells["run"].iloc[number]):
            depth = asked.get("depth")
            open_microscope(
                [listed_as[name] for name in names],
                look_at=names[0],
                depth=int(depth) if isinstance(depth, (int, float)) else None,
            )


def _open_together(listed_as: Mapping[str, str]) -> None:
    """Open a page for the marked runs."""
    asked = (st.session_state.get(_KEY) or {}).get("together") or {}
    names = [listed_as[name] for name in asked.get("names", ()) if name in listed_as]
    if names and asked.get("page") in ("", "compare", "training"):
        open_page(asked["page"], names)
