"""`depthscope analyze`: compute the metrics of a run, write them into it, print them by depth and connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import Force, Json, MaxBytes, Metrics, Select, byte_count, names, selection_of
from depthscope.app.text.terminal import emit, working
from depthscope.diagnostics.errors import InputError, StorageError


def analyze(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or the folder of a live store.")],
    metrics: Metrics = None,
    jackknife: Annotated[
        bool,
        typer.Option(
            "--jackknife",
            help="Standard errors of pooled metrics too, by leaving out one sequence at a time (slow).",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Save the metrics alone here, and leave the run as it is (.zarr)."),
    ] = None,
    select: Select = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=byte_count,
            metavar="BYTES",
            help="Measure part by part in threads that take no more than this, such as 8GiB: for runs larger than memory.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Measure on a dask cluster, such as tcp://10.0.0.1:8786, which reads RUN itself.",
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    max_bytes: MaxBytes = None,
) -> int:
    """Compute the metrics of a run.

    They are written into the run and printed by depth and connection.
    """
    import xarray as xr

    from depthscope.app.cli.analysis_output import analysis_as_dict, print_analysis, tabulate
    from depthscope.app.readings.readings import read_runs
    from depthscope.app.readings.run_arrays import with_metrics
    from depthscope.diagnostics import analyze as measure
    from depthscope.diagnostics import schema
    from depthscope.diagnostics.schema.groups import group_path

    # What cannot be written is refused before anything is computed.
    if out is not None:
        if os.path.realpath(out) == os.path.realpath(run):
            raise InputError(
                f"--out {out} is the run itself, whose trace it would replace; name another place, or leave it out"
            )
        schema.require_replaceable(out, force=force)
    elif schema.is_live_store(run):
        raise InputError(
            f"{run} is a live store, into which its recorder writes; name another file for the metrics with --out RUN"
        )
    selection = selection_of(select)
    asked = names(metrics)
    if memory or scheduler:
        if jackknife or out is None or (memory and scheduler):
            raise InputError(
                "--memory (threads of this process) or --scheduler (a cluster) goes with --out RUN, since a run of this size "
                "is not written again, and without --jackknife"
            )
        with working(f"analysing {run}") as progress, _client(scheduler) as client:
            analysis = measure(run, asked, scheduler=client, memory=memory, progress=progress)
        opened = xr.DataTree(xr.Dataset(attrs=analysis.attrs))
    else:
        opened = schema.open_run(run, max_bytes=max_bytes)
        with working(f"analysing {run}") as progress:
            # Into memory, since the run is replaced by a new one below.
            opened.load()
            opened.close()
            analysis = measure(opened, metrics=asked, jackknife=jackknife, progress=progress)
    chains = schema.by_chain(analysis)
    groups = {f"/{group_path('metrics', chain)}": each for chain, each in chains.items()}
    measured = xr.DataTree.from_dict({"/": xr.Dataset(attrs=opened.attrs), **groups})
    if out is not None:
        # Of named metrics other commands compute the rest.
        marked = {path: each.assign_attrs({schema.COMPLETE: not asked}) for path, each in groups.items()}
        tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs=opened.attrs), **marked})
        written = schema.save_run(tree, out, force=force)
    else:
        written = schema.save_run(with_metrics(opened, chains, complete=not asked), run, force=True)
    # Judged and printed is what was measured now, not what the run contained before.
    readings = read_runs({schema.without_suffix(run.name): measured})
    tables = [tabulate(reading, selection, asked or ()) for reading in readings]
    if json:
        emit(analysis_as_dict(tables, selection, written))
    else:
        print_analysis(tables, written)
    return FINE


@contextmanager
def _client(address: str | None) -> Iterator[Any]:
    """The client of a dask cluster; threads of this process without an address."""
    if address is None:
        yield "threads"
        return
    import distributed

    try:
        client = distributed.Client(address, timeout=20)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"no scheduler answers at {address} ({error}); start one with: dask scheduler"
        ) from error
    with client:
        yield client
