"""`depthscope analyze`: compute the metrics of a run, write them into it, print them by depth and connection."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import (
    WIDTH,
    Force,
    Json,
    MaxBytes,
    Metrics,
    Select,
    byte_count,
    names,
    option,
    say_table,
    selection_of,
)
from depthscope.app.text.terminal import command_line, emit, printable, say, working
from depthscope.diagnostics.errors import InputError, StorageError

if TYPE_CHECKING:
    from depthscope.app.figures import Selection
    from depthscope.app.readings.readings import Reading
    from depthscope.app.tables.tables import Table


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
        Path | None, option("RUN", "Save the metrics alone here, and leave the run as it is (.zarr).")
    ] = None,
    select: Select = None,
    memory: Annotated[
        int | None,
        option(
            "BYTES",
            "Measure part by part in threads that take no more than this, such as 8GiB: for runs larger than memory.",
            parser=byte_count,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        option("ADDRESS", "Measure on a dask cluster, such as tcp://10.0.0.1:8786, which reads RUN itself."),
    ] = None,
    force: Force = False,
    json: Json = False,
    max_bytes: MaxBytes = None,
) -> int:
    """Compute the metrics of a run.

    They are written into the run and printed by depth and connection.
    """
    import xarray as xr

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
    if json:
        emit(_as_dict(readings, selection, written))
    else:
        _print(readings, selection, written)
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


def _tables(reading: Reading, selection: Selection) -> dict[str, Table]:
    """What is printed of a reading: one row for each depth, and one for each connection, where there are any."""
    from depthscope.app.tables.tables import depth_table, mixing_table

    tables = {"depth": depth_table(reading, selection), "connection": mixing_table(reading, selection)}
    return {axis: table for axis, table in tables.items() if table is not None}


def _as_dict(readings: Sequence[Reading], selection: Selection, written: Path) -> dict[str, Any]:
    """The document that ``depthscope analyze --json`` prints."""
    tables = {reading.name: _tables(reading, selection) for reading in readings}
    return {
        "written": str(written),
        **{name: {each.name: each.attrs.get(name) for each in readings} for name in ("proof", "constraint")},
        "not_computed": {each.name: each.not_computed for each in readings},
        # Names with the errors and nulls that accompany a metric, as they are called in /metrics.
        "metrics": sorted({str(name) for each in readings for name in each.analysis.data_vars}),
        **{
            axis: {run: of[axis].data.to_dict("records") for run, of in tables.items() if axis in of}
            for axis in ("depth", "connection")
        },
    }


def _print(readings: Sequence[Reading], selection: Selection, written: Path) -> None:
    """Print the tables, then what is not in them and where it is."""
    from depthscope.app.text.numbers import constraint_sentence, proof_sentence
    from depthscope.diagnostics import CATALOGUE

    tables = {reading.name: _tables(reading, selection) for reading in readings}
    for table in (table for of_run in tables.values() for table in of_run.values()):
        if table.metrics or "num_tokens" in table.data:
            say_table(table.caption, table.printed)
    evidence = {reading.name: reading.attrs for reading in readings}
    lines = [constraint_sentence(evidence), proof_sentence(evidence)]
    # After all tables: what could not be computed is easily missed between two of them.
    for reading in readings:
        columns = {
            "num_tokens",
            *(metric for table in tables[reading.name].values() for metric in table.metrics),
        }
        others = [
            str(name) for name in reading.analysis.data_vars if name in CATALOGUE and name not in columns
        ]
        if others:  # such as matrices of every two depths
            where = f"they are in /metrics of {written}, and in: {command_line('dashboard', written)}"
            lines.append(f"Measured in {reading.name}, not printed: {', '.join(others)}: {where}")
        lines += [f"Not computed: {', '.join(names)}: {why}" for why, names in reading.not_computed.items()]
    for line in filter(None, lines):
        # Paths and metric names are copied from here, so that none is broken at a hyphen.
        say(
            textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        )
    say(f"Metrics written to {printable(written)}")
