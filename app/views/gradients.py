"""How large are states and gradients at every depth? Norms and the backward gain."""

from __future__ import annotations

from app.views.desk import desk, explain_missing
from app.views.grid import show_figures, show_question
from app.views.style import heading

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
