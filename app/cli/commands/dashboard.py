"""`depthscope dashboard`: browse runs at a local address until interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_browser, add_runs
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.values import Number


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--port", type=Number(0, 65535), metavar="PORT", help="0 to 65535 (default, and for 0: a free one)"
    )
    add_browser(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.dashboard.server import launch

    paths = [Path(run) for run in args.runs]
    launch(paths, port=args.port, open_browser=args.browser, max_bytes=args.max_bytes)
    return FINE


COMMAND = Command("dashboard", "browse runs", _add_arguments, _run)
