"""`depthscope dashboard`: browse runs at a local address until interrupted."""

from __future__ import annotations

from typing import Annotated

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import Browser, MaxBytes, Runs, option


def dashboard(
    runs: Runs,
    port: Annotated[int, option("PORT", "0 takes a free one.", min=0, max=65535)] = 0,
    browser: Browser = True,
    max_bytes: MaxBytes = None,
) -> int:
    """Browse runs in the browser, local only."""
    from depthscope.app.dashboard.server import launch

    launch(runs, port=port or None, open_browser=browser, max_bytes=max_bytes)
    return FINE
