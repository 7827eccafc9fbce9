"""What is a page? Its declaration, its heading with the facts of the chosen runs, and why it cannot be shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chosen_runs import require_chosen_runs, say_unknown_runs
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.readings.depth_map import plain_attributes
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import spoken
from depthscope.app.text.visible import LONGEST_NAME, LONGEST_TEXT, shortened, visible


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


def facts_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Facts as rows, runs as columns: what the attributes of the runs say in a word, a number or a sentence.

    Returns: Of escaped text, with a dash where a run lacks a fact.
    """
    table = pd.DataFrame({escaped(reading.name): _facts(reading) for reading in readings})
    return table.fillna("–").map(escaped).rename_axis("fact")


def _facts(reading: Reading) -> dict[str, Any]:
    analysis = reading.analysis
    counts = analysis["num_tokens"].sel(scope="data", tokens="all") if "num_tokens" in analysis else None
    facts = {
        "states": analysis.sizes.get("depth"),
        # The largest over depth: stages of a convolutional network have fewer tokens further down.
        "tokens analysed": None if counts is None else f"{float(counts.max()):g}",
        **plain_attributes({name: _in_words(value) for name, value in reading.attrs.items()}),
    }
    return {
        spoken(name): shortened(str(value), LONGEST_NAME)
        for name, value in facts.items()
        if value not in (None, "")
    }


def _in_words(value: Any) -> Any:
    """Of a list of facts, or of one that has a sentence, the sentences."""
    parts = value if isinstance(value, list) else [value]
    known = [part["sentence"] for part in parts if isinstance(part, Mapping) and "sentence" in part]
    return "; ".join(map(str, known)) if known and len(known) == len(parts) else value
