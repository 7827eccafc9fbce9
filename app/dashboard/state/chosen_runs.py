"""What is known about the chosen runs, and where does a click lead? Their readings, and the page that it opens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import streamlit as st
import xarray as xr

from depthscope.app.figures.build.values import feeds
from depthscope.app.readings.readings import Reading


@dataclass(frozen=True)
class ChosenRuns:
    """The runs that a visitor has chosen and that can be read.

    ``readings``: run (or run/chain) name → reading.
    """

    readings: Mapping[str, Reading]

    @cached_property
    def analyses(self) -> dict[str, xr.Dataset]:
        """Run name → analysis, in the order of the runs' colours."""
        return {name: reading.analysis for name, reading in self.readings.items()}

    def feeding(self, *needs: Iterable[str]) -> list[str]:
        """Names of the runs that can feed one of several figures, by the variables that each needs."""
        return [
            name for name, data in self.analyses.items() if any(feeds(data, tuple(each)) for each in needs)
        ]


_KEY = "visit"


def open_microscope(runs: Sequence[str], *, look_at: str, depth: int | None = None) -> None:
    """Note that the microscope is to be opened on a reading, and that runs are chosen in the sidebar."""
    open_page("microscope", runs, look=look_at, pin=depth)


def open_page(page: str, runs: Sequence[str], **values: Any) -> None:
    """Note that a page is to be opened, and that runs are chosen in the sidebar."""
    st.session_state[_KEY] = (page, {"runs": list(dict.fromkeys(runs)), **values})


def a_click_leads_on() -> bool:
    """Whether a click leads to another page."""
    return _KEY in st.session_state


def follow(pages: Mapping[str, Any]) -> None:
    """Go where the last click leads."""
    visit = st.session_state.pop(_KEY, None)
    if visit is not None:
        page, chosen = visit
        for name, value in chosen.items():
            st.session_state[name] = value
        st.switch_page(pages[page])
