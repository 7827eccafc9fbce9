"""`depthscope study`: small models that differ in their connection, in their width or in their depth, trained and compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_seeds
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import OutputFolder
from depthscope.app.cli.values import Number, OneOf
from depthscope.app.text.terminal import emit, say, show_rows

# Longer is a typing error: the models are small, and nothing of them changes after some hours.
MINUTES_OF_A_WEEK = 7 * 24 * 60


CONNECTIONS = "connections"
STUDIES = (CONNECTIONS, "width", "depth")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study",
        nargs="?",
        type=OneOf(lambda: STUDIES),
        default=CONNECTIONS,
        metavar="STUDY",
        help="connections: residual, HC and mHC side by side (default); width, depth: a coordinate check, how the change of "
        "the states by training scales, in standard parametrisation and in μP or CompleteP (a minute or two)",
    )
    parser.add_argument(
        "--out",
        type=OutputFolder(),
        metavar="DIR",
        help="folder for runs and weights (connections), or for results and a figure",
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
        help="time to spend on connections (default 10)",
    )
    add_seeds(parser, about="which share the time")
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if args.memory and args.study != CONNECTIONS:
        raise ValueError(f"--memory belongs to the study of connections; leave it or {args.study} out")
    if args.memory:
        return _tell_memory(as_json=args.json)
    if args.study != CONNECTIONS:
        return _tell_scaling(args)
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


def _tell_scaling(args: argparse.Namespace) -> int:
    from depthscope.app.study import scaling
    from depthscope.app.study.training import single_threaded
    from depthscope.app.text.terminal import working

    folder = None if args.out is None else Path(args.out)
    if folder is not None:  # before the training
        scaling.require_replaceable(args.study, folder)
    with working(f"training models of every {args.study}"), single_threaded():
        results = scaling.run_scaling_study(args.study, seeds=max(args.seeds, scaling.SEEDS))
    saved = [] if folder is None else scaling.save_study(results, folder)
    found = scaling.summary(results)
    if args.json:
        sizes = next(iter(results.values()))["size"].values.tolist()
        emit(
            {
                "study": args.study,
                "sizes": sizes,
                "parametrisations": found,
                "files": [str(path) for path in saved],
            }
        )
        return FINE
    say(f"exponent of what training changes over {args.study} (95 %, Student's t):")
    say()
    show_rows(("place", *(each["title"] for each in found)), scaling.table_cells(results))
    say()
    for each in found:
        say(f"{each['title']}: {each['sentence']}")
    for path in saved:
        say(f"saved: {path}")
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


COMMAND = Command(
    "study", "train small models of each family, width or depth and compare them", _add_arguments, _run
)
