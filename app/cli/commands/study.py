"""`depthscope study`: train small models that differ in their connection alone, and probe each; or say what streams cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_seeds
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import OutputFolder
from depthscope.app.cli.values import Number
from depthscope.app.text.terminal import emit, say, show_rows

# Longer is a typing error: the models are small, and nothing of them changes after some hours.
MINUTES_OF_A_WEEK = 7 * 24 * 60


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=OutputFolder(), metavar="DIR", help="folder for the runs and the weights (to train)"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="train nothing: say what 1, 2, 4 and 8 streams move and keep, by formula and measured",
    )
    parser.add_argument(
        "--minutes",
        type=Number(0.01, MINUTES_OF_A_WEEK, whole=False),
        default=10.0,
        metavar="M",
        help="time to spend (default 10)",
    )
    add_seeds(parser, about="which share the time")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if args.memory:
        return _tell_memory(as_json=args.json)
    if args.out is None:
        raise ValueError("no folder came; name one with --out DIR, or ask for --memory, which writes nothing")
    from depthscope.app.study.study import run_seeds

    # Paths alone on stdout: `depthscope check $(depthscope study --out runs)` works.
    runs = run_seeds(Path(args.out), seeds=args.seeds, seconds=60 * args.minutes / args.seeds)
    if args.json:
        emit({"runs": {name: str(path) for name, path in runs.items()}})
        return FINE
    for path in runs.values():
        say(str(path))
    return FINE


def _tell_memory(*, as_json: bool) -> int:
    from depthscope.app.study.memory import COLUMNS, memory_over_streams, table_rows
    from depthscope.app.study.recipe import Recipe

    rows = memory_over_streams(Recipe())
    if as_json:
        emit({"memory": rows})
    else:
        show_rows(COLUMNS, table_rows(rows))
    return FINE


COMMAND = Command("study", "train small models of each family and compare them", _add_arguments, _run)
