"""How large are states and gradients at every depth, and how do blocks stretch small changes? Norms, gains, Jacobians."""

from __future__ import annotations

from functools import partial

import streamlit as st

from depthscope.app.dashboard.components.chart import card
from depthscope.app.dashboard.components.controls import chosen_run
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import show_figures
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures.build.jacobian_figures import jacobian_figures, jacobian_maps

SECTION = "Jacobians"

COMMAND = "depthscope jacobian RUN.zarr --model CHECKPOINT --text FILE"


def _show_jacobians(chosen: ChosenRuns) -> None:
    results = {
        name: reading.results["jacobian"]
        for name, reading in chosen.readings.items()
        if "jacobian" in reading.results
    }
    if not results:
        st.info(
            "The chosen runs have no Jacobians. A run has states and gradients, not the derivative of one state by "
            "another: that takes the model. Measured once, it is saved next to the run and shown here.",
            icon="ℹ️",
        )
        st.code(COMMAND, "bash")
        return
    figures = jacobian_figures(results, chosen.analyses)
    maps = jacobian_maps(results)
    left, right = st.columns(2)
    with left:
        for figure in figures[:2]:
            card(figure, key=f"chart_{figure.name}")
    with right:
        card(figures[2], key=f"chart_{figures[2].name}")
        run = chosen_run(list(maps))
        card(maps[run], key="chart_jacobian_map", height=300)
    if len(results) < len(chosen.readings):
        st.caption("The other runs have none yet; this measures them:")
        st.code(COMMAND, "bash")


PAGE = Page(
    title="Gradients and Jacobians",
    url_path="gradients",
    help="Does the signal vanish or explode on its way forward, and the gradient on its way back?",
    question="gradients",
    needs=("gradient_norm",),
    missing="None of the chosen runs has gradients: they were captured without a backward pass.",
    command="depthscope probe CHECKPOINT --text FILE --gradients --out RUN.zarr",
    show=partial(show_figures, question="gradients", after={SECTION: _show_jacobians}),
)
