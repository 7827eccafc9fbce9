"""How large are states and gradients at every depth? Norms and the backward gain."""

from __future__ import annotations

from depthscope.app.dashboard.components.figure_grid import show_figures, show_question
from depthscope.app.dashboard.components.page_style import heading
from depthscope.app.dashboard.state.chosen_runs import desk, explain_missing

heading(
    "Gradients", "Does the signal vanish or explode on its way forward, and the gradient on its way back?"
)
found = desk()
if not any("gradient_norm" in data for data in found.analyses.values()):
    explain_missing(
        "gradients",
        "None of the chosen runs holds gradients: they were captured without a backward pass.",
        "depthscope probe CHECKPOINT --text FILE --gradients --out RUN.nc",
    )
show_question(found, "gradients")
show_figures(found, "gradients")
