"""How large are states and gradients at every depth? Norms and the backward gain."""

from __future__ import annotations

from depthscope.app.dashboard.components.page import Page

PAGE = Page(
    title="Gradients",
    url_path="gradients",
    help="Does the signal vanish or explode on its way forward, and the gradient on its way back?",
    question="gradients",
    needs=("gradient_norm",),
    missing="None of the chosen runs has gradients: they were captured without a backward pass.",
    command="depthscope probe CHECKPOINT --text FILE --gradients --out RUN.nc",
)
