"""`depthscope analyze`: compute the metrics of a run, write them into it, print them by depth and connection."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import (
    RUN_FILE,
    add_json,
    add_max_bytes,
    add_metrics,
    add_out,
    add_selection,
    selection_of,
)
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import InputPath, InputRun, require_writable
from depthscope.app.cli.values import ByteCount, Number
from depthscope.app.text.terminal import emit, working
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    import xarray as xr


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=InputRun(),
        help="run file (.zarr, .zarr.zip) or live store; several with --workers or --scheduler",
    )
    add_max_bytes(parser)
    add_metrics(parser, about="only these metrics (default: all that the run has data for)")
    parser.add_argument(
        "--jackknife",
        action="store_true",
        help="standard errors of pooled metrics too, by leaving out one sequence at a time (slow)",
    )
    parser.add_argument(
        "--initial",
        type=InputPath(must_exist=False),
        metavar="CHECKPOINT",
        help="the model before training: shows how far training moved the mixing of an mHC, corrected for weight decay",
    )
    parser.add_argument(
        "--decay",
        type=Number(1e-9, 1, whole=False),
        metavar="FACTOR",
        help="factor by which weight decay shrank the initial logits, ∏(1 − learning rate × weight decay) over the steps "
        "(default 1: no decay)",
    )
    parser.add_argument(
        "--workers",
        type=Number(1, 4096),
        metavar="N",
        help="measure on N processes of this machine, which read what they need: for runs larger than memory (needs dask)",
    )
    parser.add_argument(
        "--memory",
        type=ByteCount(),
        metavar="BYTES",
        help="with --workers: memory limit of each process, such as 2GiB",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="measure on the workers of a dask cluster, such as tcp://10.0.0.1:8786, which read the runs under the same path",
    )
    add_out(
        parser,
        RUN_FILE,
        metavar="RUN",
        about="save the metrics alone here, and leave the run as it is (with workers by default NAME.metrics.zarr next to it)",
        required=False,
    )
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.cli.analysis_output import analysis_as_dict, print_analysis, tabulate
    from depthscope.app.readings.readings import read_runs
    from depthscope.diagnostics import analyze, schema

    if args.decay is not None and args.initial is None:
        raise InputError(
            "got --decay alone; expected --initial CHECKPOINT too: the decay is that of its logits"
        )
    if args.workers or args.scheduler:
        return _run_on_workers(args)
    if len(args.runs) > 1:
        raise InputError(
            f"got {len(args.runs)} runs; expected one, or --workers N to measure several (depthscope compare shows them)"
        )
    if args.memory:
        raise InputError("got --memory alone; expected --workers N too, whose memory it limits")
    args.run = args.runs[0]
    # The metrics are written into the run itself: that its folder cannot be written to is said before they are computed.
    if args.out is None and schema.is_live_store(args.run):
        raise InputError(
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
    measured = _tree(run.attrs, groups)
    readings = read_runs({schema.without_suffix(Path(args.run).name): measured})
    tables = [tabulate(reading, selection, args.metrics or ()) for reading in readings]
    if args.json:
        emit(analysis_as_dict(tables, selection, written))
    else:
        print_analysis(tables, written)
    return FINE


def _run_on_workers(args: argparse.Namespace) -> int:
    """Measure saved runs on the workers of a cluster, and save the metrics next to them."""
    _require_options_of_workers(args)
    from depthscope.app.cli.analysis_output import analysis_as_dict, print_analysis, tabulate
    from depthscope.app.readings.readings import read_runs
    from depthscope.diagnostics import schema
    from depthscope.diagnostics.analysis.analyze import analyze_saved

    places = {run: Path(args.out) if args.out else _beside(run, force=args.force) for run in args.runs}
    for place in places.values():
        schema.require_replaceable(place, force=args.force)
    with working(f"analysing {len(args.runs)} run{'s' * (len(args.runs) > 1)}") as progress:
        analyses = analyze_saved(
            {run: run for run in args.runs},
            scheduler=args.scheduler or "processes",
            workers=args.workers,
            memory=args.memory,
            metrics=args.metrics,
            progress=progress,
        )
    selection = selection_of(args)
    printed = []
    for run, analysis in analyses.items():
        groups = _metric_groups(analysis)
        measured = _tree(analysis.attrs, groups)
        written = schema.save_run(
            _tree(analysis.attrs, _complete(groups, args)), places[run], force=args.force
        )
        tables = [
            tabulate(reading, selection, args.metrics or ())
            for reading in read_runs({schema.without_suffix(Path(run).name): measured})
        ]
        if args.json:
            printed.append(analysis_as_dict(tables, selection, written))
        else:
            print_analysis(tables, written)
    if args.json:
        emit(printed[0] if len(printed) == 1 else {"runs": printed})
    return FINE


def _require_options_of_workers(args: argparse.Namespace) -> None:
    if args.workers and args.scheduler:
        raise InputError(
            "--workers starts processes here, and --scheduler names a cluster that is there; give one of them"
        )
    if args.memory and not args.workers:
        raise InputError(
            "--memory limits the processes of --workers; those of a cluster have limits of their own"
        )
    given = [name for name, value in (("jackknife", args.jackknife), ("initial", args.initial)) if value]
    if given:
        raise InputError(
            f"--{given[0]} does not go with workers; leave it out, or analyse the run in this process"
        )
    if args.out and len(args.runs) > 1:
        raise InputError(
            "--out names one file for several runs; leave it out: each gets NAME.metrics.zarr next to it"
        )
    if len(set(args.runs)) < len(args.runs):
        raise InputError("a run is given twice; expected each once")


def _beside(run: str, *, force: bool) -> Path:
    """Where the metrics of a run go by default; an existing file is refused without ``--force``."""
    from depthscope.diagnostics.schema import without_suffix

    place = Path(run).with_name(f"{without_suffix(Path(run).name)}.metrics.zarr")
    if place.exists() and not force:
        raise InputError(f"{place} exists; name another file with --out, or add --force to replace it")
    return place


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


def _tree(attrs: Mapping[Any, Any], groups: Mapping[str, xr.Dataset]) -> xr.DataTree:
    """A run with nothing but these groups."""
    import xarray as xr

    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def _complete(groups: Mapping[str, xr.Dataset], args: argparse.Namespace) -> dict[str, xr.Dataset]:
    """The metrics with the note whether they are all that the run can feed: other commands then compute the rest."""
    from depthscope.app.readings.readings import COMPLETE

    return {path: metrics.assign_attrs({COMPLETE: not args.metrics}) for path, metrics in groups.items()}


def _write(run: xr.DataTree, groups: dict[str, xr.Dataset], args: argparse.Namespace) -> Path:
    """Save the metrics alone under ``--out``, or in the run with everything else that it contains."""
    import xarray as xr

    from depthscope.app.readings.stored_metrics import renewed
    from depthscope.diagnostics import CATALOGUE, schema
    from depthscope.diagnostics.quantities.initial_logits import LOGITS

    # Metrics that were named are a part of those that the run can feed: other commands then compute the rest.
    complete = not args.metrics
    nodes = {"/": xr.Dataset(attrs=run.attrs)}
    if args.out:
        return schema.save_run(_tree(run.attrs, _complete(groups, args)), args.out, force=args.force)
    # Other initial logits change the metrics that read them, so their stored values no longer apply.
    outdated = [name for name, metric in CATALOGUE.items() if args.initial and LOGITS in metric.roots]
    # Trace and statistics are written again as they are: saving replaces the file.
    for node in run.subtree:
        if node.path not in groups:
            nodes[node.path] = node.to_dataset()
    for path, metrics in groups.items():
        stored = schema.chain_dataset(run, "metrics", path.removeprefix("/metrics").strip("/"))
        nodes[path] = renewed(metrics, stored, complete=complete, outdated=outdated)
    return schema.save_run(xr.DataTree.from_dict(nodes), args.run, force=True)


COMMAND = Command("analyze", "compute the metrics of a run", _add_arguments, _run)
