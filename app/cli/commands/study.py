"""`depthscope study`: small models of several kinds, trained and compared; what of some papers holds in them."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_seeds
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import OutputFolder
from depthscope.app.cli.values import Number, OneOf, Spans
from depthscope.app.text.terminal import emit, say, show_rows
from depthscope.diagnostics.errors import InputError

# Longer is a typing error: the models are small, and nothing of them changes after some hours.
MINUTES_OF_A_WEEK = 7 * 24 * 60


FAMILIES = "families"
MINUTES = 10.0
SCALING = ("width", "depth")
# Named here and not imported: torch takes seconds. A test compares them with the studies that there are.
REPRODUCTIONS = ("answer", "connections", "initialisation", "stream-collapse", "rescue", "fig8")
PAGED = "answer"
STUDIES = (FAMILIES, *REPRODUCTIONS, *SCALING)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study",
        nargs="?",
        type=OneOf(lambda: STUDIES),
        default=FAMILIES,
        metavar="STUDY",
        help="families: residual, HC and mHC side by side (default); answer: do all layers hold the same, in which "
        "design, at what cost (80 minutes); connections, initialisation, stream-collapse, rescue, fig8: what of some papers "
        "holds in small networks, in some minutes each, saved after each network; width, depth: a coordinate check, how the "
        "change of the states by training scales, in standard parametrisation and in μP or CompleteP",
    )
    parser.add_argument(
        "--out",
        type=OutputFolder(),
        metavar="DIR",
        help="folder for runs and weights (families), for results and a figure (width, depth), or for everything of a study: "
        "the same command continues from it",
    )
    parser.add_argument(
        "--page",
        type=OutputFolder(),
        metavar="DIR",
        help="for answer: write answer.md with its table and figures there; without --out from the table in that folder",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="train nothing: print what 1, 2, 4 and 8 streams move and save for the backward, by formula and measured",
    )
    parser.add_argument(
        "--minutes",
        type=Number(0.01, MINUTES_OF_A_WEEK, whole=False),
        metavar="M",
        help=f"time to spend: on families (default {MINUTES:g}), or until no further network of a study begins (default: all)",
    )
    parser.add_argument(
        "--depths",
        type=Spans(),
        metavar="N,N",
        help="layers of the networks of a study, such as 4,8,16",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and two steps: to see that a study runs"
    )
    add_seeds(parser, about="which share the time of families (default 1; of a study 5)", default=None)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    _require_fitting(args)
    if args.memory:
        return _tell_memory(as_json=args.json)
    if args.study in SCALING:
        return _tell_scaling(args)
    if args.page is not None and args.out is None:
        return _tell_page(args)
    return _tell_reproduction(args) if args.study in REPRODUCTIONS else _tell_families(args)


def _require_fitting(args: argparse.Namespace) -> None:
    """Refuse options that the study does not have, and a missing folder."""
    if args.memory and args.study != FAMILIES:
        raise InputError(f"--memory belongs to the study of families; leave it or {args.study} out")
    if args.study not in REPRODUCTIONS and (args.quick or args.depths is not None):
        raise InputError(
            f"--quick and --depths belong to {', '.join(REPRODUCTIONS)}; leave them out of {args.study}"
        )
    if args.page is not None and args.study != PAGED:
        raise InputError(f"--page belongs to {PAGED}; leave it out of {args.study}")
    if (
        args.page is not None
        and args.out is None
        and (args.quick or args.depths or args.seeds or args.minutes)
    ):
        raise InputError("without --out nothing is trained; name the folder of the study, or --page alone")
    if args.out is None and args.page is None and not args.memory and args.study not in SCALING:
        hint = ", or ask for --memory, which writes nothing" if args.study == FAMILIES else ""
        raise InputError(f"no folder came; name one with --out DIR{hint}")


def _tell_families(args: argparse.Namespace) -> int:
    from depthscope.app.study.study import run_seeds

    # Paths alone on stdout: `depthscope check $(depthscope study --out runs)` works.
    seeds, minutes = args.seeds or 1, args.minutes or MINUTES
    runs = run_seeds(Path(args.out), seeds=seeds, seconds=60 * minutes / seeds)
    if args.json:
        emit({"runs": {name: str(path) for name, path in runs.items()}})
        return FINE
    for path in runs.values():
        say(str(path))
    return FINE


def _tell_reproduction(args: argparse.Namespace) -> int:
    from depthscope.app.study.reproductions.run import run_reproduction

    found = run_reproduction(
        args.study,
        Path(args.out),
        quick=args.quick,
        depths=args.depths,
        seeds=args.seeds,
        minutes=args.minutes,
        page=None if args.page is None else Path(args.page),
    )
    if args.json:
        emit(
            {
                "study": args.study,
                "done": found.done,
                "planned": found.planned,
                "claims": [claim.as_dict() for claim in found.claims],
                "files": [str(path) for path in found.written],
            }
        )
        return FINE
    say(found.summary.partition("\n")[2])  # without the mark that is for files
    for path in found.written:
        say(f"saved: {path}")
    return FINE


def _tell_page(args: argparse.Namespace) -> int:
    """Write the page from its table of measurements: nothing is trained."""
    from depthscope.app.study.reproductions.answer_page import write_page

    written = [str(path) for path in write_page(Path(args.page))]
    if args.json:
        emit({"study": args.study, "files": written})
        return FINE
    for path in written:
        say(f"saved: {path}")
    return FINE


def _tell_scaling(args: argparse.Namespace) -> int:
    from depthscope.app.study import scaling
    from depthscope.app.study.training import single_threaded
    from depthscope.app.text.terminal import working

    folder = None if args.out is None else Path(args.out)
    if folder is not None:  # before the training
        scaling.require_replaceable(args.study, folder)
    with working(f"training models of every {args.study}"), single_threaded():
        results = scaling.run_scaling_study(args.study, seeds=max(args.seeds or 1, scaling.SEEDS))
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
    "study", "train small models and compare them; test which results of papers hold", _add_arguments, _run
)
