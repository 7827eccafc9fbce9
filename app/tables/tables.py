"""Which numbers does a paper print? One row per depth, one row per connection, with errors and nulls."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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


def data_and_text(
    columns: Mapping[str, Sequence[Any]], headings: Mapping[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table as numbers and as text.

    ``columns``: key → plain values, or cells.
    ``headings``: key → what is printed above the column; others are in the numbers alone.
    """
    data: dict[str, Sequence[Any]] = {}
    for key, values in columns.items():
        if any(isinstance(value, Cell) for value in values):
            data |= {key + end: [getattr(cell, part) for cell in values] for end, part in _WRITTEN.items()}
        else:
            data[key] = values
    printed = {heading: list(map(_text, columns[key])) for key, heading in headings.items()}
    # Errors, nulls and places that nothing has would be empty columns of the CSV.
    return pd.DataFrame(data).dropna(axis="columns", how="all"), pd.DataFrame(printed)


def _text(value: Any) -> str:
    if isinstance(value, (int, np.integer)):
        return UNDEFINED if value < 0 else str(value)  # the embedding has no layer
    if isinstance(value, float):
        return UNDEFINED if math.isnan(value) else f"{value:g}"
    return str(value)


@dataclass(frozen=True, eq=False)
class Column:
    """One measured column: values along one dimension with their errors, their nulls and the names that people read."""

    key: str
    label: str
    metric: str
    value: xr.DataArray
    stderr: xr.DataArray | None = None
    null: xr.DataArray | None = None

    @cached_property
    def cells(self) -> list[Cell]:
        """Every number with its error and its null, which is one for all or one for each."""
        parts = (self.value, None if self.stderr is None else margin(self.stderr)[0], self.stderr, self.null)
        missing = np.full(self.value.size, math.nan)
        known = (
            missing if part is None else np.broadcast_to(part.values, self.value.shape).astype(np.float64)
            for part in parts
        )
        return [Cell(*map(float, numbers)) for numbers in zip(*known, strict=True)]


def column_of(analysis: xr.Dataset, metric: str, view: Selection, **fixed: Any) -> Column | None:
    """The slice of a metric that a selection names, with its error and null; None where the run has no defined value."""
    value = _picked(analysis, metric, view, fixed)
    # A slice with another dimension left, such as a matrix, is no column; one of NaN alone would be dashes.
    if value is None or value.ndim != 1 or not bool(value.notnull().any()):
        return None
    # A label that is a number, such as a quantile, needs the name of its dimension.
    words = [label if isinstance(label, str) else f"{dim} {label:g}" for dim, label in fixed.items()]
    return Column(
        key="_".join((metric, *words)).replace(" ", "_"),
        label=" ".join((spoken(metric), *words)),
        metric=metric,
        value=value,
        stderr=_picked(analysis, f"{metric}_stderr", view, fixed),
        null=_picked(analysis, f"{metric}_null", view, fixed),
    )


def _picked(
    analysis: xr.Dataset, name: str, view: Selection, fixed: Mapping[str, Any]
) -> xr.DataArray | None:
    """As `pick`, and along dimensions that a selection has no field for, such as ``kind``, too."""
    value = pick(analysis, name, view, **fixed)
    if value is None:
        return None
    # Labels that `pick` has selected are no dimension of the slice any more.
    return value.sel({dim: label for dim, label in fixed.items() if dim in value.dims})


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
    place = _places(reading.analysis, "depth", (("layer", "layer"), ("site", "site"), ("module", "module")))
    for name, scope in TOKEN_COUNTS.items():
        counts = pick(reading.analysis, "num_tokens", view, scope=scope)
        if counts is not None:
            place[name] = np.broadcast_to(counts.values, len(place["depth"]))
    return _measured_table(reading, "depth", "Signal by depth", place, view)


def mixing_table(reading: Reading, view: Selection | None = None) -> Table | None:
    """Gains, violations and collapse of the stream mixing by connection; None for a run without stream mixing."""
    names = (("connection_layer", "layer"), ("branch", "branch"), ("connection_branch", "branch"))
    place = _places(reading.analysis, "connection", names)
    table = _measured_table(reading, "mixing", "Stream mixing by connection", place, view or Selection())
    return table if table.metrics else None


def _places(analysis: xr.Dataset, along: str, names: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    size = analysis.sizes.get(along, 0)
    place = {along: np.asarray(analysis[along].values) if along in analysis.coords else np.arange(size)}
    for coord, printed in names:
        # Runs of different families carry different names of a connection; those that a run lacks are no column.
        if coord in analysis.coords and analysis[coord].dims == (along,):
            place[printed] = np.asarray(analysis[coord].values)
    return place


def _measured_table(
    reading: Reading, kind: str, title: str, place: Mapping[str, np.ndarray], view: Selection
) -> Table:
    title = f"{title}: {reading.name}"
    columns = columns_along(next(iter(place)), reading.analysis, view)
    # Paths of modules are wider than all numbers, and the notes have the numbers of tokens; both are in the data.
    headings = {name: name for name in place if name not in ("module", *TOKEN_COUNTS)}
    data, printed = data_and_text(
        {
            **{name: values.tolist() for name, values in place.items()},
            **{each.key: each.cells for each in columns},
        },
        headings | {column.key: column.label for column in columns},
    )
    shown = evenly_spaced(len(printed), MOST_ROWS)
    left_out = "" if len(shown) == len(printed) else f"{len(shown)} of {len(printed)} rows; the CSV has all."
    return Table(
        name=f"{kind}_{slug(reading.name)}",
        title=title,
        caption=joined(f"{title}.", proof_sentence({reading.name: reading.attrs}), left_out),
        notes=notes_of([reading], {reading.name: columns}, view),
        data=data,
        printed=printed.iloc[shown].reset_index(drop=True),
        metrics=tuple(dict.fromkeys(column.metric for column in columns)),
    )


def joined(*sentences: str) -> str:
    """Sentences in a row, without those that are empty."""
    return " ".join(filter(None, sentences))


def measured_note(readings: Sequence[Reading], metrics: Iterable[str], view: Selection) -> str:
    """How each metric of a table was measured, from how many tokens, and its unit; those that are alike in one sentence."""
    alike: dict[str, list[str]] = {}
    for metric in dict.fromkeys(metrics):
        analyses = {each.name: each.analysis for each in readings if metric in each.analysis}
        words = _measured_words(analyses, metric, view)
        if words:
            alike.setdefault(words, []).append(spoken(metric))
    return " ".join(sentence([f"{', '.join(names)}: {words}"]) for words, names in alike.items())


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


def notes_of(
    readings: Sequence[Reading], columns: Mapping[str, Sequence[Column]], view: Selection, *more: str
) -> tuple[str, ...]:
    """What the signs of a table mean, how its numbers were measured, and their units."""
    known = [column for of_run in columns.values() for column in of_run]
    metrics = [column.metric for column in known]
    words = interval_words(
        NamedError(run, column.label, column.stderr) for run, of_run in columns.items() for column in of_run
    )
    has_null = any(column.null is not None for column in known)
    has_gaps = any(bool(column.value.isnull().any()) for column in known)
    notes = (
        measured_note(readings, metrics, view),
        f"± is {words}; of a number without ± no error is estimated." if words else "",
        "Baseline: the value expected without structure, such as of independent entries." if has_null else "",
        *more,
        f"{UNDEFINED}: undefined or not measured." if has_gaps or len(readings) > 1 else "",
    )
    return tuple(filter(None, notes))


def slug(name: str) -> str:
    """A file name and LaTeX label from a run's name: letters, digits, dots and dashes."""
    safe = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in ".-") else "-" for letter in name
    )
    # A name that begins with a dot is hidden, one with a dash is an option; file systems allow 255 bytes with an ending.
    safe = safe.strip("-.")[:60]
    # A name that was safe already stays readable; only a changed one could collide with another.
    if safe and safe == name:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:6]  # two names never share a slug
    return f"{safe}-{mark}" if safe else f"run-{mark}"


class NamedError(NamedTuple):
    """A standard error with the run and the metric that it is of."""

    run: str
    metric: str
    error: xr.DataArray | None


def interval_words(errors: Iterable[NamedError]) -> str:
    """What intervals some numbers have; where they are not all of one kind, with the runs or the metrics of each."""
    kinds: dict[str, dict[str, dict[str, None]]] = {}
    for run, metric, error in errors:
        if error is not None and bool(error.notnull().any()):
            kinds.setdefault(margin(error)[1], {}).setdefault(run, {})[metric] = None
    if len(kinds) < 2:
        return next(iter(kinds), "")
    runs = [run for of_kind in kinds.values() for run in of_kind]
    return ", ".join(f"{words} for {_whose(of_kind, runs)}" for words, of_kind in kinds.items())


def _whose(metrics: Mapping[str, Collection[str]], runs: Sequence[str]) -> str:
    """The runs of one kind of interval; of a run that has several kinds, with the metrics."""
    if len(set(runs)) == 1:
        return ", ".join(*metrics.values())
    return ", ".join(
        run if runs.count(run) == 1 else f"{run} ({', '.join(names)})" for run, names in metrics.items()
    )
