"""What costs more than a page takes by itself? Metrics that are computed here when a visitor asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import streamlit as st

from depthscope.app.dashboard.components.markdown import escaped, inside_sentence
from depthscope.app.dashboard.state import run_library
from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import CATALOGUE

__all__ = ["offer_metrics"]


def offer_metrics(readings: Iterable[Reading], metrics: Sequence[str], *, key: str) -> None:
    """A choice of metrics and a button that computes them for the runs that lack them; nothing where none lacks any.

    ``metrics``: names of the catalogue, in the order in which they are offered.
    """
    readings = list(readings)
    _explain_impossible(readings, metrics)
    lacking = {reading.name: _lacking(reading, metrics) for reading in readings}
    names = [name for name in metrics if any(name in each for each in lacking.values())]
    if not names:
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = names
        if len(names) > 1:
            chosen = st.multiselect(
                "Slow metrics (click to compute)",
                names,
                default=names,
                format_func=lambda name: CATALOGUE[name].title,
                # Of the names: a choice of metrics that are computed by now would be no option any more.
                key=f"{key}_{'_'.join(names)}",
                width=900,
            )
        else:
            st.markdown(
                f"Slow metric (click to compute): {escaped(inside_sentence(CATALOGUE[names[0]].title))}."
            )
        asked = st.button("Compute", key=f"{key}_compute", disabled=not chosen)
    st.caption("Saved next to the run until its file changes. To have them in the file itself:")
    st.code(f"depthscope analyze RUN.zarr --metrics {','.join(names)}", "bash")
    if asked:
        _compute(readings, {run: [name for name in each if name in chosen] for run, each in lacking.items()})


def _lacking(reading: Reading, metrics: Sequence[str]) -> list[str]:
    on_request = set(reading.analysis.attrs.get("on_request", ()))
    return [name for name in metrics if name in on_request]


def _explain_impossible(readings: Sequence[Reading], metrics: Sequence[str]) -> None:
    """Why a metric that was asked for is not there: it is offered no more."""
    for reading in readings:
        reasons = reading.analysis.attrs.get("not_computed", {})
        for name in metrics:
            if name in reasons and not CATALOGUE[name].default:
                st.caption(escaped(f"{reading.name} has no {CATALOGUE[name].label}: {reasons[name]}."))


def _compute(readings: Sequence[Reading], wanted: Mapping[str, Sequence[str]]) -> None:
    """Compute metrics run by run, and draw the page again with them; where that fails the reason stays on the page."""
    # All chains of a run are measured at once.
    by_run = {reading.path: reading for reading in readings if wanted[reading.name]}
    bar = st.empty()
    failed = False
    for number, reading in enumerate(by_run.values()):
        of = f" ({number + 1} of {len(by_run)})" if len(by_run) > 1 else ""

        def progress(metric: str, done: int, total: int, name: str = reading.name, of: str = of) -> None:
            bar.progress(done / max(total, 1), f"Measuring {escaped(name)}{of}: {escaped(metric)}")

        reason = run_library.measure(reading, wanted[reading.name], progress=progress)
        if reason:
            st.error(escaped(reason))
            failed = True
    bar.empty()
    if not failed:
        st.rerun()
