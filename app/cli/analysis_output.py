"""What of an analysis is printed? Tables by depth and by connection; larger metrics are named, and are in the JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.figures import Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import Table, depth_table, mixing_table
from depthscope.app.text.numbers import constraint_sentence, proof_sentence
from depthscope.app.text.terminal import command_line, printable, say, show_rows
from depthscope.diagnostics import CATALOGUE

WIDTH = 100
"""Columns at which running text is wrapped."""


@dataclass(frozen=True, eq=False)
class AnalysisTables:
    """The printed form of one reading.

    ``reading``: one chain of one run.
    ``by_depth``: one row for each depth.
    ``by_connection``: one row for each connection, where there are any.
    ``not_in_tables``: computed metrics without a column: those that were asked for by name, and every metric of pairs
    of depths or connections.
    """

    reading: Reading
    by_depth: Table
    by_connection: Table | None
    not_in_tables: tuple[str, ...]


def tabulate(reading: Reading, selection: Selection, asked: Collection[str]) -> AnalysisTables:
    """Tables of one reading.

    ``asked``: metrics that were asked for by name.
    """
    by_depth, by_connection = depth_table(reading, selection), mixing_table(reading, selection)
    columns = {"num_tokens", *by_depth.metrics, *(by_connection.metrics if by_connection else ())}
    analysis = reading.analysis
    named = [name for name in asked if name in analysis and name not in columns]
    # A matrix of every two depths has no place in a table with one row per depth.
    pairs = [
        str(name)
        for name, values in analysis.data_vars.items()
        if name in CATALOGUE and {"other_depth", "other_connection"} & set(values.dims)
    ]
    return AnalysisTables(reading, by_depth, by_connection, tuple(dict.fromkeys([*named, *pairs])))


def analysis_as_dict(tables: Sequence[AnalysisTables], selection: Selection, written: Path) -> dict[str, Any]:
    """The document that ``depthscope analyze --json`` prints.

    ``written``: the run that the metrics were written to.
    """
    # Names with the errors and nulls that accompany a metric, as they are called in /metrics.
    names = {str(name) for each in tables for name in each.reading.analysis.data_vars}
    return {
        "written": str(written),
        "proof": {each.reading.name: each.reading.attrs.get("proof") for each in tables},
        "constraint": {each.reading.name: each.reading.attrs.get("constraint") for each in tables},
        "not_computed": {each.reading.name: each.reading.not_computed for each in tables},
        "metrics": sorted(names),
        "depth": {each.reading.name: each.by_depth.data.to_dict("records") for each in tables},
        "connection": {
            each.reading.name: each.by_connection.data.to_dict("records")
            for each in tables
            if each.by_connection
        },
        # The key is part of the JSON's public form.
        "apart": {
            each.reading.name: {
                name: _values_as_dict(each.reading.analysis[name], selection) for name in each.not_in_tables
            }
            for each in tables
        },
    }


def _values_as_dict(values: xr.DataArray, selection: Selection) -> dict[str, Any]:
    """One metric at its last step in the selected slice: the dims that remain, their labels, the values."""
    # As in the tables: of a training history the final weights are shown.
    if "step" in values.dims:
        values = values.isel(step=-1)
    # Only labels that the array has are selected: a metric of the mean stream alone has no other stream.
    labels = {dim: getattr(selection, str(dim), None) for dim in values.dims}
    part = values.sel({dim: label for dim, label in labels.items() if label in values[dim].values})
    return {
        "dims": part.dims,
        "labels": {dim: part[dim].values for dim in part.dims},
        "values": part.values,
    }


def print_analysis(tables: Sequence[AnalysisTables], written: Path) -> None:
    """Print the tables, then what is not in them and where it is.

    ``written``: the run that the metrics were written to.
    """
    for each in tables:
        for table in (each.by_depth, each.by_connection):
            if table is not None and (table.metrics or "num_tokens" in table.data):
                say(textwrap.fill(table.caption, WIDTH))
                show_rows(
                    [str(column) for column in table.printed], table.printed.astype(str).to_numpy().tolist()
                )
                say()
    evidence = {each.reading.name: each.reading.attrs for each in tables}
    for sentence in filter(None, (constraint_sentence(evidence), proof_sentence(evidence))):
        _say_wrapped(sentence)
    # After all tables: what could not be computed is easily missed between two of them.
    for each in tables:
        if each.not_in_tables:
            found = each.reading.analysis
            names = ", ".join(f"{name} ({_printed_dims(found[name])})" for name in each.not_in_tables)
            # All three places: in a terminal a matrix can only be pointed to.
            where = (
                f"they are in /metrics of {written}, in --json, and in: {command_line('dashboard', written)}"
            )
            _say_wrapped(f"Measured in {each.reading.name}, not printed: {names}: {where}")
        for reason, metrics in each.reading.not_computed.items():
            _say_wrapped(f"Not computed: {', '.join(metrics)}: {reason}")
    say(f"Metrics written to {printable(written)}")


def _printed_dims(values: xr.DataArray) -> str:
    """Such as "depth × other depth", which explains why a metric is in no table of one row per depth."""
    return " × ".join(str(dim).replace("_", " ") for dim in values.dims if dim != "step")


def _say_wrapped(text: str) -> None:
    # Paths and metric names are copied from here, so that none is broken at a hyphen.
    say(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
