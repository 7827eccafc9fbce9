"""`depthscope study`: train small models that differ in their connection alone, and probe each."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_out_folder, add_seeds
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.values import Number
from depthscope.app.text.terminal import say

# Longer is a typing error: the models are small, and nothing of them changes after some hours.
MINUTES_OF_A_WEEK = 7 * 24 * 60


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_folder(parser, about="folder for the runs and the weights")
    parser.add_argument(
        "--minutes",
        type=Number(0.01, MINUTES_OF_A_WEEK, whole=False),
        default=10.0,
        metavar="M",
        help="time to spend (default 10)",
    )
    add_seeds(parser, about="which share the time")


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.study.study import run_seeds

    # Paths alone on stdout: `depthscope check $(depthscope study --out runs)` works.
    for path in run_seeds(Path(args.out), seeds=args.seeds, seconds=60 * args.minutes / args.seeds).values():
        say(str(path))
    return FINE


COMMAND = Command("study", "train small models of each family and compare them", _add_arguments, _run)
