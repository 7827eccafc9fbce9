"""`depthscope analyze`: compute the metrics of a run, write them into it, print them by depth and connection."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from depthscope.app.cli.arguments import (
    RUN_FILE,
    add_json,
    add_metrics,
    add_out,
    add_run,
    add_selection,
    selection_of,
)
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import InputPath, require_writable
from depthscope.app.cli.values import Number
from depthscope.app.text.terminal import emit, working

if TYPE_CHECKING:
    import xarray as xr


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_metrics(parser, about="only these (default: all that the run can feed)")
    parser.add_argument(
        "--jackknife",
        action="store_true",
        help="standard errors of pooled metrics too, by leaving out one sequence at a time (slow)",
    )
    parser.add_argument(
        "--initial",
        type=InputPath(must_exist=False),
        metavar="CHECKPOINT",
        help="the model before training: shows how far training moved the mixing of an mHC, weight decay taken out",
    )
    parser.add_argument(
        "--decay",
        type=Number(1e-9, 1, whole=False),
        metavar="FACTOR",
        help="what weight decay left of the initial logits, ∏(1 − learning rate × weight decay) over the steps (default "
        "1: they are not decayed)",
    )
    add_out(
        parser,
        RUN_FILE,
        metavar="RUN",
        about="save the metrics alone here, and leave the run as it is",
        required=False,
    )
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    import xarray as xr

    from depthscope.app.cli.analysis_output import analysis_as_dict, print_analysis, tabulate
    from depthscope.app.readings.readings import read_runs, without_ending
    from depthscope.diagnostics import analyze, schema

    if args.decay is not None and args.initial is None:
        raise ValueError(
            "came --decay alone; expected --initial CHECKPOINT too: the decay is that of its logits"
        )
    # The metrics are written into the run itself: that its folder cannot be written to is said before they are computed.
    if args.out is None and schema.is_live_store(args.run):
        raise ValueError(
            f"{args.run} is a live store, into which its recorder writes; name another file for the metrics with --out RUN"
        )
    if args.out is None:
        require_writable(Path(args.run), "RUN")
    else:
        schema.require_replaceable(args.out, force=args.force)
    selection = selection_of(args)
    run = schema.open_run(args.run, max_bytes=args.max_bytes)
    with working(f"analysing {args.run}") as progress:
        # Into memory, since the file is replaced by a new one below.
        run.load()
        run.close()  # before the metrics are written into the same file
        run = _with_initial_logits(run, args)
        analysis = analyze(run, metrics=args.metrics, jackknife=args.jackknife, progress=progress)
    groups = _metric_groups(analysis)
    written = _write(run, groups, args)
    # Judged and printed is what was measured now, not what the run contained before.
    measured = xr.DataTree.from_dict({"/": xr.Dataset(attrs=run.attrs), **groups})
    readings = read_runs({without_ending(Path(args.run).name): measured})
    tables = [tabulate(reading, selection, args.metrics or ()) for reading in readings]
    if args.json:
        emit(analysis_as_dict(tables, selection, written))
    else:
        print_analysis(tables, written)
    return FINE


def _with_initial_logits(run: xr.DataTree, args: argparse.Namespace) -> xr.DataTree:
    """The run with the mixing logits of ``--initial``, decayed by ``--decay``; the run itself without them."""
    if args.initial is None:
        return run
    from depthscope import probes
    from depthscope.diagnostics import with_replay

    # None and not 1.0 as the default of the option: only so is --decay without --initial recognised.
    decay = 1.0 if args.decay is None else args.decay
    return with_replay(run, probes.initial_logits(args.initial), decay=decay)


def _metric_groups(analysis: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """The analysis as groups of a run: one, or one for each chain."""
    import xarray as xr

    if isinstance(analysis, xr.Dataset):
        return {"/metrics": analysis}
    return {f"/metrics/{chain}": node.to_dataset() for chain, node in analysis.children.items()}


def _write(run: xr.DataTree, groups: dict[str, xr.Dataset], args: argparse.Namespace) -> Path:
    """Save the metrics alone under ``--out``, or in the run with everything else that it contains."""
    import xarray as xr

    from depthscope.app.readings.readings import COMPLETE
    from depthscope.app.readings.stored_metrics import renewed
    from depthscope.diagnostics import CATALOGUE, schema
    from depthscope.diagnostics.quantities.initial_logits import LOGITS

    # Metrics that were named are a part of those that the run can feed: other commands then compute the rest.
    complete = not args.metrics
    nodes = {"/": xr.Dataset(attrs=run.attrs)}
    if args.out:
        for path, metrics in groups.items():
            nodes[path] = metrics.assign_attrs({COMPLETE: complete})
        return schema.save_run(xr.DataTree.from_dict(nodes), args.out, force=args.force)
    # Other initial logits change the metrics that read them, so their stored values no longer apply.
    outdated = [name for name, metric in CATALOGUE.items() if args.initial and LOGITS in metric.roots]
    # Trace and statistics are written again as they are: saving replaces the file.
    for node in run.subtree:
        if node.path not in groups:
            nodes[node.path] = node.to_dataset()
    for path, metrics in groups.items():
        stored = schema.chain_dataset(run, "metrics", path.removeprefix("/metrics").strip("/"))
        nodes[path] = renewed(metrics, stored, complete=complete, outdated=outdated)
    return schema.save_run(xr.DataTree.from_dict(nodes), args.run)


COMMAND = Command("analyze", "compute the metrics of a run", _add_arguments, _run)
