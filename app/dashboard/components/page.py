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
from depthscope.app.readings.readings import Reading, memory_sentence
from depthscope.app.text.numbers import number
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


_DIGEST_LENGTH = len("sha256:") + 12
"""Twelve hexadecimal digits distinguish data sets at a glance; the run has all of them."""

_PLAIN = {
    "Model": "model",
    "Family": "family",
    "Streams": "n_streams",
    "Mixing matrices": "constraint",
    "Reading": "proof",
    "Precision": "dtype",
    "Loss reduction": "loss_reduction",
    "Seed": "seed",
    "Commit": "commit",
    "Created": "created",
}
"""Fact → attribute that is shown as it is."""


def facts_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Facts as rows, runs as columns; a fact that no run has is left out.

    Returns: Of escaped text, with a dash where a run lacks a fact.
    """
    table = pd.DataFrame({escaped(reading.name): _facts(reading) for reading in readings})
    # A row of dashes would only lengthen the table.
    table = table[table.notna().any(axis=1)].fillna("–")
    return table.map(lambda value: escaped(str(value))).rename_axis("fact")


def _facts(reading: Reading) -> dict[str, Any]:
    attrs, analysis = reading.attrs, reading.analysis
    proof, expected, digest = (
        attrs.get(name) for name in ("reconstruction_error", "sites_expected", "data_digest")
    )
    digest = str(digest or "")
    software = attrs.get("software")
    facts = {name: attrs.get(attribute) for name, attribute in _PLAIN.items()} | {
        "Depth": f"{analysis.sizes['depth']} states" if "depth" in analysis.sizes else None,
        # The largest over depth: stages of a convolutional network have fewer tokens further down.
        "Tokens analysed": f"{float(analysis['num_tokens'].sel(scope='data', tokens='all').max()):g}"
        if "num_tokens" in analysis
        else None,
        "Reconstruction proof": f"states rebuilt to {number(proof, digits=2)}"
        if isinstance(proof, (int, float))
        else proof,
        # Which axis of H_res is the source is known only where the connections were proven.
        "Orientation": None if proof is None else str(attrs.get("orientation", "unknown")).replace("_", " "),
        "Sites": None if expected is None else f"{attrs.get('sites_fired')} of {expected} expected fired",
        "Changed outside connections": _sentences(attrs.get("changes_outside"), "module"),
        "Not covered": _sentences(attrs.get("not_covered"), "sentence"),
        "Memory": memory_sentence(attrs),
        "Data": f"{digest[:_DIGEST_LENGTH]}…" if len(digest) > _DIGEST_LENGTH else digest,
        "Parts": _sentences([attrs.get("parts")], "sentence"),
        "Software": ", ".join(f"{name} {version}" for name, version in software.items())
        if isinstance(software, Mapping)
        else software,
    }
    return {name: None if value in (None, "") else value for name, value in facts.items()}


def _sentences(parts: Any, name: str) -> str | None:
    """One entry of each of some mappings; what else a file of another tool has there is shown as it is."""
    if not parts or parts == [None]:
        return None
    known = isinstance(parts, list) and all(isinstance(part, Mapping) and name in part for part in parts)
    return "; ".join(str(part[name]) for part in parts) if known else str(parts)
