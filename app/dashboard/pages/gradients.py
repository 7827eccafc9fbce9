"""How large are states and gradients at every depth? Norms and the backward gain, and where Jacobians come from."""

from __future__ import annotations

import streamlit as st

from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import show_figures
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns

JACOBIANS = """import depthscope as ds
from depthscope.probes.jacobian import estimators

block = ds.jacobian(model, batch, start=3, stop=4)  # from the state at depth 3 to that at depth 4
print(estimators.sigma_max(block), estimators.squared_frobenius(block))"""
"""Needs the model: no run contains one."""


def _show(chosen: ChosenRuns) -> None:
    show_figures(chosen, "gradients")
    with st.expander("Jacobians of blocks"):
        st.caption(
            "A run has states and gradients, not the derivative of one state by another: that takes the model. Largest "
            "singular values, Frobenius norms and spectral densities, with the routing frozen or free:"
        )
        st.code(JACOBIANS, "python")


PAGE = Page(
    title="Gradients",
    url_path="gradients",
    help="Does the signal vanish or explode on its way forward, and the gradient on its way back?",
    question="gradients",
    needs=("gradient_norm",),
    missing="None of the chosen runs has gradients: they were captured without a backward pass.",
    command="depthscope probe CHECKPOINT --text FILE --gradients --out RUN.nc",
    show=_show,
)
