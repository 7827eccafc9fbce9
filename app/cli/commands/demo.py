"""`depthscope demo`: a real model and three small ones, probed, judged, written as a paper and shown."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_browser, add_out_folder, add_seeds
from depthscope.app.cli.command import FINE, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_browser(parser)
    add_out_folder(parser, default="depthscope-demo", about="folder for the runs (default depthscope-demo)")
    parser.add_argument("--quick", action="store_true", help="a short training and no SmolLM2")
    add_seeds(parser, about="each with a training of its own")


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.study.demo import run_demo

    run_demo(Path(args.out), browser=args.browser, quick=args.quick, seeds=args.seeds)
    return FINE


COMMAND = Command("demo", "look at a real model, with no arguments", _add_arguments, _run)
