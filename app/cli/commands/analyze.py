"""`depthscope analyze`: compute the metrics of a run, write them into it, print them by depth and connection."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from depthscope.app.cli.paths import InputRun, require_writable
from depthscope.app.cli.values import ByteCount
from depthscope.app.text.terminal import emit, working
from depthscope.diagnostics.errors import InputError, StorageError

if TYPE_CHECKING:
    import xarray as xr


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        type=InputRun(),
        help="run file (.nc, .zarr) or live store",
    )
    add_max_bytes(parser)
    add_metrics(parser, about="only these metrics (default: all that the run has data for)")
    parser.add_argument(
        "--jackknife",
        action="store_true",
        help="standard errors of pooled metrics too, by leaving out one sequence at a time (slow)",
    )
    parser.add_argument(
        "--memory",
        type=ByteCount(),
        metavar="BYTES",
        help="measure part by part in threads that take no more than this, such as 8GiB: for runs larger than memory",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="measure part by part on the workers of a dask cluster, such as tcp://10.0.0.1:8786, which read RUN themselves",
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
    from depthscope.app.cli.analysis_output import analysis_as_dict, print_analysis, tabulate
    from depthscope.app.readings.readings import read_runs
    from depthscope.diagnostics import analyze, schema

    if args.memory or args.scheduler:
        return _run_in_parts(args)
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


def _run_in_parts(args: argparse.Namespace) -> int:
    """Measure a run that is larger than memory, and save the metrics next to it: it is not written again."""
    from depthscope.app.cli.analysis_output import analysis_as_dict, print_analysis, tabulate
    from depthscope.app.readings.readings import read_runs
    from depthscope.diagnostics import analyze, schema

    if args.jackknife:
        raise InputError("--jackknife does not go with --memory and --scheduler; leave one of them out")
    if args.memory and args.scheduler:
        raise InputError(
            "--memory is of threads of this process, and --scheduler names a cluster; give one of them"
        )
    if args.out is None:
        raise InputError(
            "expected --out RUN: the metrics are saved alone, a run of this size is not written again"
        )
    schema.require_replaceable(args.out, force=args.force)
    selection = selection_of(args)
    with working(f"analysing {args.run}") as progress, _scheduler(args.scheduler) as scheduler:
        analysis = analyze(args.run, args.metrics, scheduler=scheduler, memory=args.memory, progress=progress)
    groups = _metric_groups(analysis)
    written = schema.save_run(_tree(analysis.attrs, _complete(groups, args)), args.out, force=args.force)
    name = schema.without_suffix(Path(args.run).name)
    tables = [
        tabulate(reading, selection, args.metrics or ())
        for reading in read_runs({name: _tree(analysis.attrs, groups)})
    ]
    if args.json:
        emit(analysis_as_dict(tables, selection, written))
    else:
        print_analysis(tables, written)
    return FINE


@contextmanager
def _scheduler(address: str | None) -> Iterator[Any]:
    """The client of a cluster of dask; threads of this process without an address."""
    if address is None:
        yield "threads"
        return
    import distributed

    try:
        client = distributed.Client(address, timeout=20)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"no scheduler answers at {address} within 20 s ({error}); start one with: dask scheduler"
        ) from error
    with client:
        yield client


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
    from depthscope.diagnostics import schema

    # Metrics that were named are a part of those that the run can feed: other commands then compute the rest.
    complete = not args.metrics
    nodes = {"/": xr.Dataset(attrs=run.attrs)}
    if args.out:
        return schema.save_run(_tree(run.attrs, _complete(groups, args)), args.out, force=args.force)
    # Trace and statistics are written again as they are: saving replaces the file.
    for node in run.subtree:
        if node.path not in groups:
            nodes[node.path] = node.to_dataset()
    for path, metrics in groups.items():
        stored = schema.chain_dataset(run, "metrics", path.removeprefix("/metrics").strip("/"))
        nodes[path] = renewed(metrics, stored, complete=complete)
    return schema.save_run(xr.DataTree.from_dict(nodes), args.run)


COMMAND = Command("analyze", "compute the metrics of a run", _add_arguments, _run)
