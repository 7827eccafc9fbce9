"""What is a page? Its declaration, and what every page shows: its heading, what it draws, or why it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st

from depthscope.app.dashboard.components.chosen_runs import require_chosen_runs, say_unknown_runs
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.text.visible import LONGEST_TEXT, visible


@dataclass(frozen=True)
class Page:
    """One page of the dashboard, declared in a file of its own in `depthscope.app.dashboard.pages`.

    ``title``: Its name in the navigation.
    ``url_path``: Its address below the root, one word; empty for the page at the root. Visitors bookmark it.
    ``help``: The sentence below the heading: the question that the page answers.
    ``show``: Draws the page from the chosen runs.
    ``show_all``: Draws a page that is about all runs, whether some are chosen or not.
    """

    title: str
    url_path: str
    help: str
    show: Callable[[ChosenRuns], None] | None = None
    show_all: Callable[[], None] | None = None


def show_page(page: Page) -> None:
    """Draw a page for the chosen runs."""
    st.markdown(f"# {page.title}" if page.url_path else f"# {page.help}")
    if page.url_path:
        st.caption(page.help)
    say_unknown_runs()
    if page.show_all is not None:
        page.show_all()
    if page.show is None:
        return
    chosen = require_chosen_runs()
    try:
        page.show(chosen)
    except Exception as error:
        # A run that was written by another tool may contain what no figure expects. The log has the traceback; the
        # visitor needs to know that the page is incomplete, and which runs to leave out.
        logging.getLogger(__name__).warning("page %s failed", page.title, exc_info=True)
        reason = visible(f"{type(error).__name__}: {error}", longest=LONGEST_TEXT)
        names = ", ".join(map(escaped, chosen.readings))
        st.error(
            f"The rest of this page cannot be drawn for {names}: {escaped(reason)}. "
            "Leave one run out after another to find the one that it is about, and measure that one again."
        )
