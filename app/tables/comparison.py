"""How do runs compare? One row for each run, and the same metrics side by side at the same relative depth."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from depthscope.app.figures.build.values import pick, positions
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import (
    TOKEN_COUNTS,
    Column,
    Table,
    column_of,
    notes_of,
)
from depthscope.app.text.numbers import UNDEFINED, proof_sentence, quantity
from depthscope.app.text.visible import LONGEST_NAME, shortened
from depthscope.diagnostics.errors import InputError

# Chosen by hand, one for each question of the dashboard: the table has a block of rows for each metric, and
# `depthscope compare --metrics` takes any other.
COMPARED_METRICS = ("effective_rank", "token_cosine", "residual_norm", "gradient_norm", "composite_gain")


@dataclass(frozen=True)
class Extreme:
    """One summary number of a run: a metric at the place that matters.

    ``metric``: variable of the analysis.
    ``place``: the last position, an extreme, or largest over smallest magnitude along the depth.
    ``fixed``: labels that override the selection.
    """

    metric: str
    place: str
    fixed: Mapping[str, str] = field(default_factory=dict)


# Chosen by hand: which place along the depth matters is not a property of a metric but of the question about it.
SUMMARY = (
    Extreme("effective_rank", "last"),
    Extreme("effective_rank", "lowest"),
    Extreme("token_cosine", "last"),
    Extreme("adjacent_cka", "lowest"),
    Extreme("gradient_norm", "span"),
    Extreme("composite_gain", "highest", {"direction": "forward"}),
    Extreme("composite_gain", "highest", {"direction": "backward"}),
    Extreme("deflated_gain", "last"),
    Extreme("effective_streams", "lowest"),
)

# What of a number is written for machines; people get half of its interval in place of the standard error.
_WRITTEN = ("", "_stderr", "_null")

_SHORT = {"last": "last", "lowest": "min", "highest": "max", "span": "max/min"}


def summary_table(readings: Sequence[Reading], view: Selection | None = None) -> Table:
    """One row per run: what it is, its decisive numbers, how much was found."""
    view = view or Selection()
    facts = [_facts(reading, view) for reading in readings]
    # Two tables in step: numbers at full precision for the CSV, text for people.
    data, printed = pd.DataFrame(facts), pd.DataFrame([_printed_facts(row) for row in facts])
    found: dict[str, list[Column]] = {reading.name: [] for reading in readings}
    symbols: dict[str, str] = {}
    for extreme in SUMMARY:
        columns = [column_of(reading.analysis, extreme.metric, view, **extreme.fixed) for reading in readings]
        # The heading and the symbol are the same for all runs: those of the first one that has the metric.
        known = next((column for column in columns if column is not None), None)
        if known is None:
            continue
        for reading, column in zip(readings, columns, strict=True):
            found[reading.name] += [] if column is None else [column]
        cells = [_at_extreme(column, extreme.place) for column in columns]
        key = f"{known.key}_{extreme.place}"
        data = data.assign(**{key + end: [cell[end] for cell in cells] for end in (*_WRITTEN, "_at")})
        heading = f"{known.label}, {_SHORT[extreme.place]}"
        printed[heading] = [_cell_text(cell, extreme.place) for cell in cells]
        symbols[extreme.metric] = known.symbol
    printed = printed.drop(columns="model")  # the widest cell; it stays in the data
    for severity in ("fail", "warn"):
        counts = [
            sum(found.severity.name.lower() == severity for found in reading.findings) for reading in readings
        ]
        data[f"num_{severity}"], printed[severity] = counts, [str(count) for count in counts]
    places = "@: the depth or connection of the extreme. Fail and warn count findings."
    return Table(
        name="summary",
        title="Summary of runs",
        caption=" ".join(
            filter(None, ("Summary of runs: n streams, L layers, N tokens in all.", _unproven(readings)))
        ),
        # Errors, nulls and places that no run has would be empty columns of the CSV.
        data=data.dropna(axis="columns", how="all"),
        printed=printed,
        symbols={metric: symbol for metric, symbol in symbols.items() if symbol},
        metrics=tuple(symbols),
        notes=notes_of(readings, found, view, places),
    )


def _facts(reading: Reading, view: Selection) -> dict[str, Any]:
    analysis, attrs = reading.analysis, reading.attrs
    # Layers count from 0 and -1 is none, so that a run without layers has 0 of them.
    layers = analysis["layer"].values if "layer" in analysis.coords else np.array([-1])
    counts = {name: pick(analysis, "num_tokens", view, scope=scope) for name, scope in TOKEN_COUNTS.items()}
    streams = attrs.get("n_streams") or 1
    return {
        "run": reading.name,
        "model": shortened(str(attrs.get("model") or UNDEFINED), LONGEST_NAME),
        "family": shortened(str(attrs.get("family") or UNDEFINED), LONGEST_NAME),
        # A file of another tool may have anything there, which is printed as it is.
        "streams": int(streams)
        if isinstance(streams, (int, np.integer))
        else shortened(str(streams), LONGEST_NAME),
        "layers": int(layers.max()) + 1,
        # The largest: stages of a convolutional network have fewer tokens further down.
        **{name: math.nan if of is None else float(of.max()) for name, of in counts.items()},
    }


def _printed_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    headings = {"streams": "n", "layers": "L", "num_tokens": "N", "tokens_per_sequence": "N per sequence"}
    return {
        # Tokens a sequence are a mean over sequences of different length.
        headings.get(name, name): f"{round(value, 1):g}" if isinstance(value, float) else str(value)
        for name, value in facts.items()
    }


def _at_extreme(column: Column | None, place: str) -> dict[str, float]:
    empty = dict.fromkeys((*_WRITTEN, "_margin", "_at"), math.nan)
    if column is None:
        return empty
    values = np.asarray(column.value.values, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    if known.size == 0:
        return empty
    if place == "span":
        size = np.abs(values[known])
        # An exact zero is a signal that is gone: the span is infinite, not undefined.
        return empty | {"": float(size.max() / size.min()) if size.min() > 0 else math.inf}
    index = {
        "last": known[-1],
        "lowest": known[np.argmin(values[known])],
        "highest": known[np.argmax(values[known])],
    }
    at = int(index[place])
    return _cell(column, at) | {"_at": float(at)}


def _cell(column: Column, at: int) -> dict[str, float]:
    """One number of a column with its standard error, its null, and what is printed after ±."""
    numbers = column.numbers()
    parts = {end: numbers.get(column.key + end) for end in _WRITTEN}
    cell = {end: math.nan if values is None else float(values[at]) for end, values in parts.items()}
    margin = column.margin
    return cell | {"_margin": math.nan if margin is None else float(margin.values[at])}


def _cell_text(cell: Mapping[str, float], place: str) -> str:
    text = quantity(cell[""], cell["_margin"], cell["_null"])
    where = cell["_at"]
    # The last place needs no index, and a span has two.
    return text if place in ("last", "span") or math.isnan(where) else f"{text} @{int(where)}"


def _unproven(readings: Sequence[Reading]) -> str:
    """Which of the runs are unproven, and why; empty for none."""
    return proof_sentence({reading.name: reading.attrs for reading in readings})


# --- the same relative depth


def comparison_table(
    readings: Sequence[Reading],
    metrics: Sequence[str] = COMPARED_METRICS,
    view: Selection | None = None,
    *,
    points: int = 6,
) -> Table:
    """Metrics of several runs side by side, each at the measured depth nearest to a relative depth.

    Raises InputError: Where no run has any of the metrics along its depth.
    """
    view = view or Selection()
    where = np.linspace(0.0, 1.0, points)
    rows: list[dict[str, Any]] = []
    found: dict[str, list[Column]] = {reading.name: [] for reading in readings}
    text: list[dict[str, str]] = []
    for metric in metrics:
        columns = {reading.name: _profile(reading, metric, view) for reading in readings}
        known = [column for column in columns.values() if column is not None]
        for run, column in columns.items():
            found[run] += [] if column is None else [column]
        # A metric that no run has would be rows of dashes; without any row the table is refused below.
        for fraction in where if known else ():
            cells = {run: _nearest(column, fraction) for run, column in columns.items()}
            start = {"metric": metric, "relative depth": float(fraction)}
            rows.append(start | {f"{run}{end}": cell[end] for run, cell in cells.items() for end in _WRITTEN})
            printed = {run: quantity(cell[""], cell["_margin"], cell["_null"]) for run, cell in cells.items()}
            text.append({"metric": known[0].label, "relative depth": f"{fraction:.2f}"} | printed)
    if not rows:
        raise InputError(
            f"no run has {', '.join(metrics)} along its depth; see: depthscope analyze RUN --json"
        )
    # Only metrics that have a row are cited and named in the caption.
    used = tuple(dict.fromkeys(row["metric"] for row in rows))
    what = "Runs side by side at the measured depth nearest to the relative depth."
    caption = (what, _unproven(readings))
    return Table(
        name="comparison",
        title="Runs side by side",
        caption=" ".join(filter(None, caption)),
        data=pd.DataFrame(rows).dropna(axis="columns", how="all"),
        printed=pd.DataFrame(text),
        metrics=used,
        notes=notes_of(readings, found, view),
    )


def one_direction(dims: Collection[Any], view: Selection) -> dict[str, str]:
    """The label that leaves one direction of a metric that has both, where the view shows both.

    Returns: Empty where the metric has no direction.
    """
    return {"direction": "forward"} if "direction" in dims and view.direction == "both" else {}


def _profile(reading: Reading, metric: str, view: Selection) -> Column | None:
    dims = reading.analysis[metric].dims if metric in reading.analysis else ()
    fixed = one_direction(dims, view)
    column = column_of(reading.analysis, metric, view, **fixed)
    # Singular values and modules have no relative depth.
    return column if column is None or column.value.dims[0] in ("depth", "connection") else None


def _nearest(column: Column | None, fraction: float) -> dict[str, float]:
    if column is None:
        return dict.fromkeys((*_WRITTEN, "_margin"), math.nan)
    along = positions(column.value, str(column.value.dims[0]), "relative")
    # The nearest measured depth and no interpolation: between two depths there is no state.
    at = int(np.argmin(np.abs(along - fraction)))
    return _cell(column, at)


def differences(readings: Sequence[Reading], view: Selection | None = None) -> list[str]:
    """What makes runs hard to compare: other data, other token counts, other precision.

    Returns: One sentence a difference; empty where there is none.
    """
    facts = {reading.name: _facts(reading, view or Selection()) | dict(reading.attrs) for reading in readings}
    sentences = []
    for key, words in (
        ("num_tokens", "different numbers of tokens, and ranks grow with N"),
        ("tokens_per_sequence", "sequences of different length, and ranks within sequences grow with it"),
        ("data_digest", "different data"),
        ("dtype", "different precision"),
    ):
        # NaN, which is no fact, differs from itself.
        known = {
            run: value for run, row in facts.items() if (value := row.get(key)) is not None and value == value
        }
        if len(set(map(str, known.values()))) > 1:
            listed = ", ".join(f"{run}: {_in_short(key, value)}" for run, value in known.items())
            sentences.append(f"the runs have {words} ({listed})")
    return [*sentences, *filter(None, [_unproven(readings)])]


def _in_short(key: str, value: object) -> str:
    if isinstance(value, float):  # a count, which is a mean where sequences differ
        return f"{value:.7g}"
    # The first letters of a digest tell as much as all 64 of them.
    is_digest = key == "data_digest" and re.fullmatch("[0-9a-f]{16,}", str(value))
    return str(value)[:8] if is_digest else shortened(str(value), LONGEST_NAME)
