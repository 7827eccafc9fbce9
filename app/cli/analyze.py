"""The commands that turn runs into numbers and verdicts: analyze, check, compare."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope import diagnostics
from depthscope.app.cli.parser import FINE, FOUND, closest
from depthscope.app.cli.terminal import emit, remark, say, show_rows, working
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import COMPLETE, Reading, open_runs, read_runs, without_ending
from depthscope.app.readings.stored_metrics import renewed
from depthscope.app.tables.comparison import COMPARED_METRICS, comparison_table, differences, summary_table
from depthscope.app.tables.findings import count_words, findings_text
from depthscope.app.tables.tables import Table, depth_table, mixing_table
from depthscope.diagnostics import CATALOGUE, Finding, Severity, schema
from depthscope.diagnostics.metrics.replay import LOGITS
from depthscope.diagnostics.verdicts import VERDICTS


def view_of(args: argparse.Namespace) -> Selection:
    """The slice that the arguments ask for; the figures' own where they are silent.

    Parameters
    ----------
    args : Namespace
        Parsed arguments.

    Returns
    -------
    Selection
    """
    asked = {name: getattr(args, name, None) for name in ("scope", "tokens", "centering", "reduction")}
    return Selection.of({name: label for name, label in asked.items() if label is not None})


def known_metrics(names: Iterable[str]) -> list[str]:
    """Names of metrics, checked against the catalogue.

    Parameters
    ----------
    names : iterable of str
        What came.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        For a name that is no metric, with the closest one.
    """
    listed = list(names)
    for name in listed:
        if name not in CATALOGUE:
            raise ValueError(f"no metric {name!r}{closest(name, CATALOGUE)}")
    return listed


def show(table: Table, *, heading: bool = True) -> None:
    """Print a table with its caption.

    Parameters
    ----------
    table : Table
        What to print.
    heading : bool
        Whether the caption comes before it.
    """
    if heading:
        say(textwrap.fill(table.caption, 100))
    show_rows([str(column) for column in table.printed], table.printed.astype(str).to_numpy().tolist())


# --- analyze


def analyze(args: argparse.Namespace) -> int:
    """Compute the metrics of a run, write them, print them by depth and by connection.

    Parameters
    ----------
    args : Namespace
        ``run, metrics, jackknife, initial, decay, out, json`` and the slice.

    Returns
    -------
    int
        Exit code.
    """
    names = known_metrics(args.metrics) if args.metrics else None
    view = view_of(args)
    _require_place(args.out, beside=args.run)
    run = schema.open_run(args.run)
    with working(f"analysing {args.run}") as progress:
        run.load()
        run.close()
        run = _with_replay(run, args.initial, args.decay)
        analysis = diagnostics.analyze(run, metrics=names, jackknife=args.jackknife, progress=progress)
    written = _write_metrics(run, analysis, args)
    analysed = xr.DataTree.from_dict({"/": xr.Dataset(attrs=run.attrs), **_metric_nodes(analysis)})
    readings = read_runs({without_ending(Path(args.run).name): analysed})
    _print_analysis(readings, written, view, args)
    return FINE


def _require_place(out: str | None, *, beside: str) -> None:
    if out is None:
        return
    if not out.endswith(schema.SUFFIXES):
        raise ValueError(
            f"--out {out!r} is no run; expected a name that ends in {', '.join(schema.SUFFIXES)}"
        )
    if Path(out).resolve() == Path(beside).resolve():
        raise ValueError(
            f"--out {out!r} is the run itself, whose trace it would replace; name another file, or leave --out out"
        )


def _with_replay(run: xr.DataTree, initial: str | None, decay: float | None) -> xr.DataTree:
    """The run with the logits that its training began with, where they are given."""
    if initial is None:
        if decay is not None:
            raise ValueError(
                "came --decay alone; expected --initial CHECKPOINT too: the decay is that of its logits"
            )
        return run
    from depthscope import probes

    return diagnostics.with_replay(run, probes.initial_logits(initial), decay=1.0 if decay is None else decay)


def _write_metrics(run: xr.DataTree, analysis: xr.Dataset | xr.DataTree, args: argparse.Namespace) -> Path:
    measured = _metric_nodes(analysis)
    complete = not args.metrics
    if args.out:
        kept = {}
        measured = {path: part.assign_attrs({COMPLETE: complete}) for path, part in measured.items()}
    else:
        kept = {node.path: node.to_dataset() for node in run.subtree if node.path not in measured}
        outdated = REPLAYED if args.initial else ()
        measured = {
            path: renewed(part, _stored(run, path), complete=complete, outdated=outdated)
            for path, part in measured.items()
        }
    nodes = {"/": xr.Dataset(attrs=run.attrs)} | kept | measured
    return schema.save_run(xr.DataTree.from_dict(nodes), args.out or args.run)


REPLAYED = frozenset(name for name, metric in CATALOGUE.items() if LOGITS in metric.roots)
"""Metrics that other initial logits change."""


def _stored(run: xr.DataTree, path: str) -> xr.Dataset | None:
    return schema.chain_dataset(run, "metrics", path.removeprefix("/metrics").strip("/"))


def _metric_nodes(analysis: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    if isinstance(analysis, xr.Dataset):
        return {"/metrics": analysis}
    return {f"/metrics/{chain}": node.to_dataset() for chain, node in analysis.children.items()}


def _print_analysis(
    readings: Sequence[Reading], written: Path, view: Selection, args: argparse.Namespace
) -> None:
    tables = {reading.name: (depth_table(reading, view), mixing_table(reading, view)) for reading in readings}
    apart = {
        reading.name: _apart(reading.analysis, tables[reading.name], args.metrics or ())
        for reading in readings
    }
    if args.json:
        emit(
            {
                "written": str(written),
                "not_computed": {reading.name: reading.not_computed for reading in readings},
                "metrics": sorted({str(name) for reading in readings for name in reading.analysis.data_vars}),
                "depth": {run: by_depth.data.to_dict("records") for run, (by_depth, _) in tables.items()},
                "connection": {
                    run: mixing.data.to_dict("records") for run, (_, mixing) in tables.items() if mixing
                },
                "apart": {
                    reading.name: {
                        name: _sliced(reading.analysis[name], view) for name in apart[reading.name]
                    }
                    for reading in readings
                },
            }
        )
        return
    for table in (table for pair in tables.values() for table in pair if table is not None):
        if table.metrics or "num_tokens" in table.data:
            show(table)
            say()
    for reading in readings:
        _say_what_is_not_printed(reading, apart[reading.name], written)
    say(f"Metrics written to {written}")


def _apart(analysis: xr.Dataset, tables: Iterable[Table | None], asked: Iterable[str]) -> list[str]:
    """Measured metrics without a column: those named, and every table over pairs."""
    columns = {metric for table in tables if table is not None for metric in table.metrics} | {"num_tokens"}
    pairs = [
        str(name)
        for name, values in analysis.data_vars.items()
        if name in CATALOGUE and {"other_depth", "other_connection"} & set(values.dims)
    ]
    named = [name for name in asked if name in analysis and name not in columns]
    return list(dict.fromkeys([*named, *pairs]))


def _sliced(values: xr.DataArray, view: Selection) -> dict[str, Any]:
    """One metric at the last step in the slice asked for: what is left of its dims, their labels, its values."""
    last = values.isel(step=-1) if "step" in values.dims else values
    asked = {dim: getattr(view, str(dim), None) for dim in last.dims}
    part = last.sel({dim: label for dim, label in asked.items() if label in last[dim].values})
    return {
        "dims": part.dims,
        "labels": {dim: part[dim].values for dim in part.dims},
        "values": part.values,
    }


def _say_what_is_not_printed(reading: Reading, apart: Sequence[str], written: Path) -> None:
    if apart:
        shapes = [f"{name} ({_shape(reading.analysis[name])})" for name in apart]
        where = f"they are in /metrics of {written}, in --json, and in: depthscope dashboard {written}"
        _say_wrapped(f"Measured in {reading.name}, not printed: {', '.join(shapes)}: {where}")
    for reason, names in reading.not_computed.items():
        _say_wrapped(f"Not computed: {', '.join(names)}: {reason}")


def _shape(values: xr.DataArray) -> str:
    return " × ".join(str(dim).replace("_", " ") for dim in values.dims if dim != "step")


def _say_wrapped(text: str) -> None:
    say(textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


# --- check


def check(args: argparse.Namespace) -> int:
    """Print the findings of runs; 1 where one reaches the limit.

    Parameters
    ----------
    args : Namespace
        ``runs, fail_on, json``.

    Returns
    -------
    int
        Exit code.
    """
    limits = known_limits(args.fail_on)
    with working("analysing and judging") as progress:
        readings = read_runs(open_runs(args.runs), progress=progress)
    failed = [
        reading.name for reading in readings if any(exceeds(found, limits) for found in reading.findings)
    ]
    if args.json:
        emit(
            {
                "failed": failed,
                "fail_on": list(args.fail_on),
                "runs": [_checked(reading) for reading in readings],
            }
        )
    else:
        _print_checks(readings, failed, args.fail_on)
    return FOUND if failed else FINE


def known_limits(names: Sequence[str]) -> tuple[Severity | None, frozenset[str]]:
    """The severity and the verdicts that fail a check.

    Parameters
    ----------
    names : sequence of str
        Severities and verdict names, mixed.

    Returns
    -------
    tuple
        The lowest severity that fails (None where none is named), and verdicts that fail from WARN on.

    Raises
    ------
    ValueError
        For a name that is neither, with the closest one.
    """
    severities = {severity.name.lower(): severity for severity in (Severity.WARN, Severity.FAIL)}
    verdicts = VERDICTS
    for name in names:
        if name not in severities and name not in verdicts:
            raise ValueError(f"no severity or verdict {name!r}{closest(name, [*severities, *verdicts])}")
    asked = [severities[name] for name in names if name in severities]
    lowest = min(asked) if asked else None
    return lowest, frozenset(name for name in names if name in verdicts)


def exceeds(finding: Finding, limits: tuple[Severity | None, frozenset[str]]) -> bool:
    """Whether a finding fails a check.

    Parameters
    ----------
    finding : Finding
        A finding.
    limits : tuple
        See `known_limits`.

    Returns
    -------
    bool
    """
    lowest, verdicts = limits
    severe = lowest is not None and finding.severity >= lowest
    return severe or (finding.verdict in verdicts and finding.severity >= Severity.WARN)


def _checked(reading: Reading) -> dict[str, Any]:
    return {"run": reading.name, "findings": [finding.as_dict() for finding in reading.findings]}


def _print_checks(readings: Sequence[Reading], failed: Sequence[str], limits: Sequence[str]) -> None:
    for reading in readings:
        about = ", ".join(str(reading.attrs[key]) for key in ("model", "family") if reading.attrs.get(key))
        say(f"{reading.name}{f' ({about})' if about else ''}: {count_words(reading.findings)}")
        say()
        say(findings_text(reading.findings))
        say()
    verdict = f"failed: {', '.join(failed)}" if failed else "passed"
    say(f"check --fail-on {','.join(limits)}: {verdict}")


# --- compare


def compare(args: argparse.Namespace) -> int:
    """Print runs side by side: a summary, then metrics at the same relative depth.

    Parameters
    ----------
    args : Namespace
        ``runs, metrics, points, json`` and the slice.

    Returns
    -------
    int
        Exit code.
    """
    metrics = known_metrics(args.metrics) if args.metrics else COMPARED_METRICS
    view = view_of(args)
    with working("analysing") as progress:
        readings = read_runs(open_runs(args.runs), progress=progress)
    summary = summary_table(readings, view)
    aligned = comparison_table(readings, metrics, view, points=args.points)
    warnings = differences(readings, view)
    for text in warnings:
        remark(text)
    if args.json:
        emit(
            {
                "warnings": warnings,
                "summary": summary.data.to_dict("records"),
                "aligned": aligned.data.to_dict("records"),
            }
        )
        return FINE
    say(textwrap.fill(summary.caption, 100))
    printed = summary.printed.copy()
    printed.insert(1, "model", summary.data["model"])
    facts = printed.set_index("run").T
    show_rows(
        ["", *map(str, facts.columns)],
        [[str(name), *map(str, row)] for name, row in zip(facts.index, facts.to_numpy(), strict=True)],
    )
    say()
    show(aligned)
    return FINE
