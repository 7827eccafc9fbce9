"""Do representations collapse across depth? Ranks and token similarity at every depth."""

from __future__ import annotations

from depthscope.app.dashboard.components.page import Page

PAGE = Page(
    title="Collapse",
    url_path="collapse",
    heading="Collapse across depth",
    help="Do tokens become equal, and does the representation use few directions?",
    question="collapse",
    missing="None of the chosen runs has states to measure.",
)
