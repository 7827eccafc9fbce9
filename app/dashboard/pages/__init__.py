"""Which pages does the dashboard have? Each is a file of this folder with a `PAGE`, and a line in the list below."""

from __future__ import annotations

from importlib import import_module

from depthscope.app.dashboard.components.page import Page

PAGES: tuple[Page, ...] = tuple(
    import_module(f"depthscope.app.dashboard.pages.{name}").PAGE
    for name in (
        "home",
        "microscope",
        "streams",
        "training",
        "compare",
    )
)
"""Every page, in the order of the navigation; the first one opens at the root of the address."""
