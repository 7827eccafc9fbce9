"""Where does a click lead? To another page with other runs: noted in a callback, followed at the start of the next run."""

# Streamlit allows to set the value of a control, and to switch the page, only before that control is drawn: a click notes
# where it leads, and the script goes there before it draws anything.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

__all__ = ["a_click_leads_on", "follow", "open_microscope", "open_page"]

_KEY = "visit"


def open_microscope(runs: Sequence[str], *, look_at: str, depth: int | None = None) -> None:
    """Note that the microscope is to be opened.

    ``runs``: names in the list of runs: they are chosen in the sidebar.
    ``look_at``: name of the reading that is under the microscope.
    """
    open_page("microscope", runs, look=look_at, pin=depth)


def open_page(page: str, runs: Sequence[str], **values: Any) -> None:
    """Note that a page is to be opened.

    ``runs``: names in the list of runs: they are chosen in the sidebar.
    ``values``: of further controls, by their keys.
    """
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
