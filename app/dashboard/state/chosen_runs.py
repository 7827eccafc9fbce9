"""What is on the page now? The chosen runs, read; those that cannot be read explain themselves."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.controls import choose_runs
from depthscope.app.dashboard.components.markdown import plain, within
from depthscope.app.dashboard.state import run_library
from depthscope.app.figures import FIGURES, FigureKind, available
from depthscope.app.readings.readings import Reading

__all__ = ["Desk", "desk", "explain_missing", "lay_out"]


@dataclass
class Desk:
    """The chosen runs.

    Parameters
    ----------
    readings : dict
        Run (or run/chain) name → reading.
    unreadable : list
        Runs that could not be read, with the reason.
    """

    readings: dict[str, Reading] = field(default_factory=dict)
    unreadable: list[run_library.Unreadable] = field(default_factory=list)

    @property
    def analyses(self) -> dict[str, xr.Dataset]:
        """Run name → analysis."""
        return {name: reading.analysis for name, reading in self.readings.items()}

    def kinds(self, question: str) -> dict[str, FigureKind]:
        """Figures of one page that the chosen runs can feed.

        Parameters
        ----------
        question : str
            The page.

        Returns
        -------
        dict
            Name → kind.
        """
        return {name: kind for name, kind in available(self.analyses).items() if kind.question == question}


def lay_out() -> Desk:
    """Choose runs in the sidebar, read them, and remember them for the page.

    Returns
    -------
    Desk
    """
    names = list(run_library.listed())
    with st.sidebar:
        chosen = choose_runs(names) if names else []
    found = Desk()
    for name in chosen:
        with st.spinner(f"Analysing {plain(name)} …"):
            book = run_library.read(name)
        if isinstance(book, run_library.Unreadable):
            found.unreadable.append(book)
        else:
            found.readings.update({reading.name: reading for reading in book.readings})
    st.session_state["_desk"] = found
    return found


def desk() -> Desk:
    """The runs of the page, after telling what could not be read; stops where there is nothing to show.

    Returns
    -------
    Desk
    """
    found: Desk = st.session_state["_desk"]
    for book in found.unreadable:
        _explain(book)
    if not found.readings:
        if not found.unreadable:
            _explain_empty()
        st.stop()
    return found


def _explain(book: run_library.Unreadable) -> None:
    """A run that cannot be read: what is wrong and the next command."""
    with st.container(border=True):
        st.markdown(f"##### ⚠ {plain(book.name)} cannot be shown")
        st.markdown(plain(book.reason))
        st.caption("Measure the model again, then reload this page:")
        st.code(f"depthscope probe CHECKPOINT --text FILE --out {shlex.quote(str(book.path))}", "bash")


def _explain_empty() -> None:
    if run_library.listed():
        st.info("No run is chosen. Choose one or more in the sidebar.", icon="👈")
        return
    st.info("There is no run here yet. Measure a model, then start the dashboard on the result.", icon="🔭")
    st.code(
        "depthscope demo\ndepthscope probe CHECKPOINT --text FILE --out runs/a.nc\ndepthscope dashboard runs",
        "bash",
    )


def explain_missing(question: str, reason: str, command: str) -> None:
    """A page that the chosen runs cannot feed says why and how to get it.

    Parameters
    ----------
    question : str
        The page.
    reason : str
        Why nothing is there.
    command : str
        Next command.
    """
    names = ", ".join(within(kind.title) for kind in FIGURES.values() if kind.question == question)
    st.info(reason, icon="ℹ️")
    st.code(command, "bash")
    st.caption(f"This page shows: {plain(names)}.")
