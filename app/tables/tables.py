"""Which numbers does a paper print? One row per depth, one row per connection, with errors and nulls."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from depthscope.app.figures import FIGURES, NOT_DRAWN
from depthscope.app.figures.build.measurement import selection_words, token_count_words
from depthscope.app.figures.build.values import defined_labels, pick
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.text.numbers import UNDEFINED, proof_sentence, quantity, sentence
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.metrics.intervals import margin
from depthscope.diagnostics.quantities.tokens import evenly_spaced

MOST_COLUMNS = 6
"""A metric with more labels than this in a table would push the others out of it; it is in the figures and in /metrics."""

MOST_ROWS = 26
"""That are printed of a run by depth; the data have all."""

TOKEN_COUNTS = {"num_tokens": "data", "tokens_per_sequence": "sequence"}
"""Column of a table → the tokens that it counts: those of metrics of all tokens, and of metrics within sequences."""

# Sinkhorn and softmax give no negative entries, so that this column would be zeros for all but hyper-connections.
_LABELS_WITHOUT_COLUMN = {"negativity"}


@dataclass(frozen=True, eq=False)
class Table:
    """One table twice: as numbers for machines and as text for people.

    ``name``: file name and LaTeX label.
    ``title, caption``: the caption names the slice, and how many of the rows are printed.
    ``data``: every number has a column; errors and nulls in ``<column>_stderr`` and ``<column>_null``.
    ``printed``: the same as text.
    ``metrics``: all metrics that the table rests on, for the bibliography.
    ``cited``: printed columns whose cells are bibliography keys.
    ``notes``: sentences below the table: what its signs mean.
    """

    name: str
    title: str
    caption: str
    data: pd.DataFrame
    printed: pd.DataFrame
    metrics: tuple[str, ...] = ()
    cited: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Cell(NamedTuple):
    """One number with what belongs to it: what is printed after ±, its standard error, its null, and its place."""

    value: float = math.nan
    margin: float = math.nan
    stderr: float = math.nan
    null: float = math.nan
    at: float = math.nan

    def __str__(self) -> str:
        text = quantity(self.value, self.margin, self.null)
        return text if math.isnan(self.at) else f"{text} @{int(self.at)}"


# What of a number is written for machines; people get half of its interval in place of the standard error.
_WRITTEN = {"": "value", "_stderr": "stderr", "_null": "null", "_at": "at"}


class Column(NamedTuple):
    """One measured column: values along one dimension, as cells too, and the names that people read."""

    key: str
    label: str
    metric: str
    value: xr.DataArray
    cells: list[Cell]
    stderr: xr.DataArray | None


def table_of(
    name: str,
    title: str,
    caption: str,
    columns: Iterable[tuple[str, str, Sequence[Any]]],
    readings: Sequence[Reading],
    measured: Mapping[str, Sequence[Column]],
    view: Selection,
    *more: str,
) -> Table:
    """A table of measured numbers, and what the signs in it mean.

    ``columns``: the name of each in the data, what is printed above it, and plain values or cells; with an empty name
    it is only printed, with an empty heading only in the data.
    ``measured``: run → its columns, which the notes are about.
    ``more``: further notes.
    """
    data: dict[str, Sequence[Any]] = {}
    printed: dict[str, list[str]] = {}
    for key, heading, values in columns:
        if heading:
            printed[heading] = list(map(_text, values))
        if key and any(isinstance(value, Cell) for value in values):
            data |= {key + end: [getattr(cell, part) for cell in values] for end, part in _WRITTEN.items()}
        elif key:
            data[key] = values
    return Table(
        name,
        title,
        " ".join(filter(None, (caption, proof_sentence({each.name: each.attrs for each in readings})))),
        # Errors, nulls and places that nothing has would be empty columns of the CSV.
        pd.DataFrame(data).dropna(axis="columns", how="all"),
        pd.DataFrame(printed),
        metrics=tuple(dict.fromkeys(column.metric for of_run in measured.values() for column in of_run)),
        notes=_notes(readings, measured, view, *more),
    )


def _text(value: Any) -> str:
    if isinstance(value, (int, np.integer)):
        return UNDEFINED if value < 0 else str(value)  # the embedding has no layer
    if isinstance(value, float):  # tokens of a sequence are a mean over sequences of different length
        return UNDEFINED if math.isnan(value) else f"{round(value, 1):g}"
    return str(value)


def column_of(analysis: xr.Dataset, metric: str, view: Selection, **fixed: Any) -> Column | None:
    """The slice of a metric that a selection names, with its error and null; None where the run has no defined value."""
    value, stderr, null = (
        pick(analysis, f"{metric}{end}", view, **fixed) for end in ("", "_stderr", "_null")
    )
    # A slice with another dimension left, such as a matrix, is no column; one of NaN alone would be dashes.
    if value is None or value.ndim != 1 or not bool(value.notnull().any()):
        return None
    # A label that is a number, such as a quantile, needs the name of its dimension.
    words = [label if isinstance(label, str) else f"{dim} {label:g}" for dim, label in fixed.items()]
    parts = (value, None if stderr is None else margin(stderr)[0], stderr, null)
    missing = np.full(value.size, math.nan)
    known = (
        # A null is one for all or one for each.
        missing if part is None else np.broadcast_to(part.values, value.shape).astype(np.float64)
        for part in parts
    )
    return Column(
        "_".join((metric, *words)).replace(" ", "_"),
        " ".join((spoken(metric), *words)),
        metric,
        value,
        [Cell(*map(float, numbers)) for numbers in zip(*known, strict=True)],
        stderr,
    )


def table_metrics(axis: str) -> list[str]:
    """The headline metrics along an axis, in the order of the figures: those with a column in its table."""
    drawn = [name for kind in FIGURES.values() for name in (*kind.needs, *kind.also)]
    metrics = [CATALOGUE[name] for name in dict.fromkeys([*drawn, *CATALOGUE]) if name not in NOT_DRAWN]
    return [
        metric.name for metric in metrics if metric.axis == axis and metric.headline and not metric.pairwise
    ]


def columns_along(axis: str, analysis: xr.Dataset, view: Selection) -> list[Column]:
    """The columns of the table along an axis that an analysis can fill."""
    columns = [
        column_of(analysis, metric, view, **labels)
        for metric in table_metrics(axis)
        if metric in analysis
        for labels in _column_labels(analysis[metric], axis, view)
    ]
    return [column for column in columns if column is not None]


def _column_labels(values: xr.DataArray, axis: str, view: Selection) -> list[dict[str, Any]]:
    """The labels that are columns of their own: of the dimensions of which the selection names none."""
    dims = [dim for dim in map(str, values.dims) if dim not in (axis, "step")]
    known = {dim: defined_labels(values, dim) for dim in dims}
    # A dimension with a selected label is one column; shares of streams have no mean and become one column a stream.
    dims = [dim for dim in dims if getattr(view, dim, None) not in known[dim]]
    labels = [[label for label in known[dim] if label not in _LABELS_WITHOUT_COLUMN] for dim in dims]
    # Without such a dimension the product has one empty choice: the metric is a single column.
    columns = [dict(zip(dims, chosen, strict=True)) for chosen in itertools.product(*labels)]
    return columns if len(columns) <= MOST_COLUMNS else []


def spoken(name: str) -> str:
    """The name of a metric or a verdict as people write it, such as ``adjacent CKA`` or ``Dong residual``."""
    if name in CATALOGUE:
        return CATALOGUE[name].label
    return " ".join("CKA" if word == "cka" else word for word in name.split("_"))


# --- one row per depth, one row per connection


def depth_table(reading: Reading, view: Selection | None = None) -> Table:
    """Rank, cosine, similarity and norms by depth."""
    view = view or Selection()
    size = reading.analysis.sizes.get("depth", 0)
    found = {
        name: pick(reading.analysis, "num_tokens", view, scope=scope) for name, scope in TOKEN_COUNTS.items()
    }
    counts = {name: np.broadcast_to(of.values, size) for name, of in found.items() if of is not None}
    names = {"layer": "layer", "site": "site", "module": "module"}
    return _measured_table(reading, "depth", "Signal by depth", "depth", names, counts, view)


def mixing_table(reading: Reading, view: Selection | None = None) -> Table | None:
    """Gains, violations and collapse of the stream mixing by connection; None for a run without stream mixing."""
    # Runs of different families carry different names of a connection.
    names = {"connection_layer": "layer", "branch": "branch", "connection_branch": "branch"}
    title = "Stream mixing by connection"
    table = _measured_table(reading, "mixing", title, "connection", names, {}, view or Selection())
    return table if table.metrics else None


def _measured_table(
    reading: Reading,
    kind: str,
    title: str,
    along: str,
    names: Mapping[str, str],
    counts: Mapping[str, np.ndarray],
    view: Selection,
) -> Table:
    """A row for each position: its names, those that the run has, its numbers of tokens, and every measured column."""
    analysis, title = reading.analysis, f"{title}: {reading.name}"
    size = analysis.sizes.get(along, 0)
    place = {along: np.asarray(analysis[along].values) if along in analysis.coords else np.arange(size)}
    known = {name for name in names if name in analysis.coords and analysis[name].dims == (along,)}
    place |= {printed: analysis[name].values for name, printed in names.items() if name in known}
    measured = columns_along(along, analysis, view)
    # Paths of modules are wider than all numbers, and the notes have the numbers of tokens; both are in the data.
    columns = [
        *((name, "" if name == "module" else name, values.tolist()) for name, values in place.items()),
        *((name, "", values.tolist()) for name, values in counts.items()),
        *((column.key, column.label, column.cells) for column in measured),
    ]
    shown = evenly_spaced(size, MOST_ROWS)
    left_out = "" if len(shown) == size else f" {len(shown)} of {size} rows; the CSV has all."
    name = f"{kind}_{slug(reading.name)}"
    table = table_of(name, title, f"{title}.{left_out}", columns, [reading], {reading.name: measured}, view)
    return replace(table, printed=table.printed.iloc[shown].reset_index(drop=True))


def _measured_words(analyses: Mapping[str, xr.Dataset], metric: str, view: Selection) -> str:
    dims = {str(dim) for analysis in analyses.values() for dim in analysis[metric].dims}
    units = CATALOGUE[metric].units if metric in CATALOGUE else "1"
    unit = "" if units == "1" else f"in units of {units}"
    if "weight" in dims:  # of no token
        return unit
    scope = view.scope if "scope" in dims else "data"
    takes_all = metric not in CATALOGUE or CATALOGUE[metric].most_tokens is None
    counts = token_count_words(analyses, view, scope) if takes_all else "a part of the tokens"
    # A metric without scopes has one, that of all tokens.
    how = selection_words({*dims, "scope"}, replace(view, scope=scope))
    return ", ".join(filter(None, (how.replace("; ", ", "), counts, unit)))


def _notes(
    readings: Sequence[Reading], measured: Mapping[str, Sequence[Column]], view: Selection, *more: str
) -> tuple[str, ...]:
    """What the signs of a table mean, how its numbers were measured, and their units."""
    known = [column for of_run in measured.values() for column in of_run]
    # How each metric was measured, from how many tokens, and its unit; those that are alike in one sentence.
    alike: dict[str, list[str]] = {}
    for metric in dict.fromkeys(column.metric for column in known):
        analyses = {each.name: each.analysis for each in readings if metric in each.analysis}
        if how := _measured_words(analyses, metric, view):
            alike.setdefault(how, []).append(spoken(metric))
    interval = interval_words((run, each.label, each.stderr) for run, of in measured.items() for each in of)
    cells = [cell for column in known for cell in column.cells]
    has_gaps = len(readings) > 1 or any(math.isnan(cell.value) for cell in cells)
    has_null = any(not math.isnan(cell.null) for cell in cells)
    notes = (
        " ".join(sentence([f"{', '.join(names)}: {how}"]) for how, names in alike.items()),
        f"± is {interval}; of a number without ± no error is estimated." if interval else "",
        "Baseline: the value expected without structure, such as of independent entries." if has_null else "",
        *more,
        f"{UNDEFINED}: undefined or not measured." if has_gaps else "",
    )
    return tuple(filter(None, notes))


def slug(name: str) -> str:
    """A file name and LaTeX label from a run's name: letters, digits, dots and dashes."""
    # A name that begins with a dot is hidden, one with a dash is an option; file systems allow 255 bytes with an ending.
    safe = re.sub(r"[^A-Za-z0-9.-]", "-", name).strip("-.")[:60]
    # A name that was safe already stays readable; only a changed one could collide with another.
    if safe and safe == name:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:6]  # two names never share a slug
    return f"{safe}-{mark}" if safe else f"run-{mark}"


def interval_words(errors: Iterable[tuple[str, str, xr.DataArray | None]]) -> str:
    """What intervals some numbers have; where they are not all of one kind, with the runs or the metrics of each.

    ``errors``: a run, its metric, and the standard error.
    """
    kinds: dict[str, dict[str, dict[str, None]]] = {}
    for run, metric, error in errors:
        if error is not None and bool(error.notnull().any()):
            kinds.setdefault(margin(error)[1], {}).setdefault(run, {})[metric] = None
    if len(kinds) < 2:
        return next(iter(kinds), "")
    runs = [run for of_kind in kinds.values() for run in of_kind]

    def whose(metrics: Mapping[str, Collection[str]]) -> str:
        """The runs of one kind of interval; of a run that has several kinds, with the metrics."""
        if len(set(runs)) == 1:
            return ", ".join(*metrics.values())
        return ", ".join(
            run if runs.count(run) == 1 else f"{run} ({', '.join(names)})" for run, names in metrics.items()
        )

    return ", ".join(f"{words} for {whose(of_kind)}" for words, of_kind in kinds.items())
