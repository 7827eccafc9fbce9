"""What is a page? Its declaration, and what every page shows: heading, findings, figures, or why there are none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st

from depthscope.app.dashboard.components.chosen_runs import require_chosen_runs, say_unknown_runs
from depthscope.app.dashboard.components.legend import show_legend
from depthscope.app.dashboard.components.markdown import escaped, inside_sentence
from depthscope.app.dashboard.components.question import show_answers, show_figures, show_findings
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.text.visible import LONGEST_TEXT, visible


@dataclass(frozen=True)
class Page:
    """One page of the dashboard, declared in a file of its own in `depthscope.app.dashboard.pages`.

    A page that shows the figures of one question needs no code: the figures, the controls that change them, and the
    findings on the metrics that they draw come from the register of figures.

    Parameters
    ----------
    title : str
        Its name in the navigation.
    url_path : str
        Its address below the root, one word; empty for the page at the root. Visitors bookmark it.
    help : str
        The sentence below the heading: what the page answers.
    question : str
        Figures of this ``FigureKind.question`` are shown; empty for none.
    heading : str
        Heading, where it is longer than the title.
    needs : tuple of str
        Variables of an analysis. Where no chosen run has one of them the page explains what is missing. Empty: where
        the runs feed no figure of the question.
    missing : str
        That explanation, as Markdown.
    command : str
        The command that produces what is missing.
    show : callable or None
        Draws the page from the chosen runs. None shows the figures of the question.
    first : callable or None
        Draws what comes before, whether runs are chosen or not.
    """

    title: str
    url_path: str
    help: str
    question: str = ""
    heading: str = ""
    needs: tuple[str, ...] = ()
    missing: str = "None of the chosen runs has what this page shows."
    command: str = "depthscope demo"
    show: Callable[[ChosenRuns], None] | None = None
    first: Callable[[], None] | None = None


def show_page(page: Page) -> None:
    """Draw a page for the chosen runs."""
    st.markdown(f"# {page.heading or page.title}")
    st.caption(page.help)
    say_unknown_runs()
    if page.first is not None:
        page.first()
    chosen = require_chosen_runs(explain=page.first is None)
    try:
        _show_contents(page, chosen)
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


def _show_contents(page: Page, chosen: ChosenRuns) -> None:
    """What a page shows of the chosen runs."""
    if page.question:
        figures = chosen.figures(page.question)
        if page.needs:
            has_data = any(name in data for data in chosen.analyses.values() for name in page.needs)
        else:
            has_data = bool(figures)
        if not has_data:
            _explain_missing(page)
        # Answers and findings first: the figures below are read with the question that they raise.
        show_answers(chosen, page.question)
        show_findings(chosen, page.question)
        if not figures:
            return
        show_legend(colour_numbers(chosen.analyses))
    if page.show is None:
        show_figures(chosen, page.question)
    else:
        page.show(chosen)


def _explain_missing(page: Page) -> None:
    """Why the chosen runs do not fill the page, how to get a run that does, and what it would show."""
    st.info(page.missing, icon="ℹ️")
    st.code(page.command, "bash")
    # All figures of the question, since the chosen runs feed none.
    titles = [inside_sentence(kind.title) for kind in FIGURES.values() if kind.question == page.question]
    st.caption(f"This page shows: {escaped(', '.join(titles))}.")
