"""Do representations collapse across depth? Ranks and token similarity at every depth."""

from __future__ import annotations

from app.views.desk import desk
from app.views.grid import show_figures, show_question
from app.views.style import heading

heading("Collapse across depth", "Do tokens become equal, and does the representation use few directions?")
found = desk()
show_question(found, "collapse")
show_figures(found, "collapse")
