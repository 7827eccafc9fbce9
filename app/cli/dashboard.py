"""`depthscope dashboard`: browse runs at a local address until interrupted."""

from __future__ import annotations

from typing import Annotated

import typer

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import Browser, MaxBytes, Runs


def dashboard(
    runs: Runs,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="0 takes a free one.")] = 0,
    browser: Browser = True,
    max_bytes: MaxBytes = None,
) -> int:
    """Browse runs in the browser, local only."""
    from depthscope.app.dashboard.server import launch

    launch(runs, port=port or None, open_browser=browser, max_bytes=max_bytes)
    return FINE
