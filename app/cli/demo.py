"""`depthscope demo`: three small trained models, probed, judged and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import Browser, option


def demo(
    out: Annotated[Path, option("DIR", "Folder for the runs.")] = Path("depthscope-demo"),
    browser: Browser = True,
) -> int:
    """Look at three small trained models: residual, HC and mHC."""
    from depthscope.app.demo.demo import run_demo

    run_demo(out, browser=browser)
    return FINE
