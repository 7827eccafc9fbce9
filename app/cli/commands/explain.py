"""`depthscope explain`: the equation, the limits and the sources of a verdict or a metric."""

from __future__ import annotations

import argparse

from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.values import Names
from depthscope.app.text.terminal import say


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        type=Names("verdict or metric", _known_names),
        metavar="NAMES",
        help="verdicts or metrics, comma separated, such as rank_collapse,effective_rank",
    )


def _known_names() -> list[str]:
    from depthscope.app.text.explanations import names

    return names()


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.text.explanations import explanation

    say("\n\n".join(explanation(name) for name in args.names))
    return FINE


COMMAND = Command(
    "explain", "print the equation, the limits and the sources of a verdict or metric", _add_arguments, _run
)
