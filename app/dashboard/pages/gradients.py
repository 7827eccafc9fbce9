"""How large are states and gradients at every depth, and how do blocks change them? Norms and gains."""

from __future__ import annotations

from functools import partial

from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.question import show_figures

PAGE = Page(
    title="Gradients",
    url_path="gradients",
    help="Does the signal vanish or explode on its way forward, and the gradient on its way back?",
    question="gradients",
    needs=("gradient_norm",),
    missing="None of the chosen runs has gradients: they were captured without a backward pass.",
    command="depthscope probe CHECKPOINT --text FILE --gradients --out RUN.zarr",
    show=partial(show_figures, question="gradients"),
)
