"""`depthscope demo`: three small trained models, probed, judged and shown."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_browser, add_out_folder
from depthscope.app.cli.command import FINE, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_browser(parser)
    add_out_folder(parser, default="depthscope-demo", about="folder for the runs (default depthscope-demo)")
    parser.add_argument(
        "--train", action="store_true", help="train the models here, which takes some minutes"
    )


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.demo.demo import run_demo

    run_demo(Path(args.out), browser=args.browser, train=args.train)
    return FINE


COMMAND = Command("demo", "look at three small trained models, with no arguments", _add_arguments, _run)
