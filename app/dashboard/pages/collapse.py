"""Do representations collapse across depth? Ranks and token similarity at every depth."""

from __future__ import annotations

from depthscope.app.dashboard.components.figure_grid import show_figures, show_question
from depthscope.app.dashboard.components.page_style import heading
from depthscope.app.dashboard.state.chosen_runs import desk

heading("Collapse across depth", "Do tokens become equal, and does the representation use few directions?")
found = desk()
show_question(found, "collapse")
show_figures(found, "collapse")
