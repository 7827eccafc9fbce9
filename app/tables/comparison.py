"""How do runs compare? One row for each run, and the same metrics side by side at the same relative depth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthscope.app.figures.build.values import pick, positions
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import (
    TOKEN_COUNTS,
    Cell,
    Column,
    Table,
    column_of,
    table_of,
)
from depthscope.app.text.numbers import UNDEFINED, proof_sentence
from depthscope.app.text.visible import LONGEST_NAME, shortened
from depthscope.diagnostics.errors import InputError

# Chosen by hand, one for each question of the dashboard: the table has a block of rows for each metric, and
# `depthscope compare --metrics` takes any other.
COMPARED_METRICS = ("effective_rank", "token_cosine", "residual_norm", "gradient_norm", "composite_gain")


# Chosen by hand: which place along the depth matters is not a property of a metric but of the question about it.
SUMMARY: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("effective_rank", "last", {}),
    ("effective_rank", "lowest", {}),
    ("token_cosine", "last", {}),
    ("adjacent_cka", "lowest", {}),
    ("gradient_norm", "span", {}),
    ("composite_gain", "highest", {"direction": "forward"}),
    ("composite_gain", "highest", {"direction": "backward"}),
    ("deflated_gain", "last", {}),
    ("effective_streams", "lowest", {}),
)
"""A metric, its place (last, an extreme, or largest over smallest magnitude), and labels that override the selection."""

_HEADINGS = {"streams": "n", "layers": "L", "num_tokens": "N", "tokens_per_sequence": "N per sequence"}

RELATIVE_DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""At which runs are put side by side."""

_SHORT = {"last": "last", "lowest": "min", "highest": "max", "span": "max/min"}


def summary_table(readings: Sequence[Reading], view: Selection | None = None) -> Table:
    """One row per run: what it is, its decisive numbers, how much was found."""
    view = view or Selection()
    rows = [_facts(reading, view) for reading in readings]
    # The model is the widest cell; it stays in the data.
    columns: list[tuple[str, str, Sequence[Any]]] = [
        (name, "" if name == "model" else _HEADINGS.get(name, name), [row[name] for row in rows])
        for name in rows[0]
    ]
    measured: dict[str, list[Column]] = {reading.name: [] for reading in readings}
    for metric, place, labels in SUMMARY:
        of_runs = [column_of(reading.analysis, metric, view, **labels) for reading in readings]
        # The heading is the same for all runs: that of the first one that has the metric.
        known = next((column for column in of_runs if column is not None), None)
        if known is None:
            continue
        for reading, column in zip(readings, of_runs, strict=True):
            measured[reading.name] += [] if column is None else [column]
        cells = [_at_extreme(column, place) for column in of_runs]
        columns.append((f"{known.key}_{place}", f"{known.label}, {_SHORT[place]}", cells))
    for severity in ("fail", "warn"):
        found = [[each.severity.name.lower() for each in reading.findings] for reading in readings]
        columns.append((f"num_{severity}", severity, [each.count(severity) for each in found]))
    places = "@: the depth or connection of the extreme. Fail and warn count findings."
    caption = "Summary of runs: n streams, L layers, N tokens in all."
    return table_of("summary", "Summary of runs", caption, columns, readings, measured, view, places)


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


def _at_extreme(column: Column | None, place: str) -> Cell:
    if column is None:
        return Cell()
    values = np.asarray(column.value.values, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    if known.size == 0:
        return Cell()
    if place == "span":
        size = np.abs(values[known])
        # An exact zero is a signal that is gone: the span is infinite, not undefined.
        return Cell(float(size.max() / size.min()) if size.min() > 0 else math.inf)
    if place == "last":  # which needs no index
        return column.cells[known[-1]]
    at = known[np.argmin(values[known]) if place == "lowest" else np.argmax(values[known])]
    return column.cells[at]._replace(at=float(at))


# --- the same relative depth


def comparison_table(
    readings: Sequence[Reading], metrics: Sequence[str] = COMPARED_METRICS, view: Selection | None = None
) -> Table:
    """Metrics of several runs side by side, each at the measured depth nearest to a relative depth.

    Raises InputError: Where no run has any of the metrics along its depth.
    """
    view = view or Selection()
    profiles = {
        metric: {reading.name: _profile(reading, metric, view) for reading in readings} for metric in metrics
    }
    # A metric that no run has would be rows of dashes.
    shown = {metric: of for metric, of in profiles.items() if any(of.values())}
    if not shown:
        raise InputError(
            f"no run has {', '.join(metrics)} along its depth; see: depthscope analyze RUN --json"
        )
    rows = [(metric, float(where)) for metric in shown for where in RELATIVE_DEPTHS]
    labels = {metric: next(column.label for column in of.values() if column) for metric, of in shown.items()}
    columns: list[tuple[str, str, Sequence[Any]]] = [
        ("metric", "", [metric for metric, _ in rows]),
        ("", "metric", [labels[metric] for metric, _ in rows]),
        ("relative depth", "relative depth", [where for _, where in rows]),
    ]
    columns += [
        (run, run, [_nearest(shown[metric][run], where) for metric, where in rows])
        for run in (reading.name for reading in readings)
    ]
    measured = {
        reading.name: [column for of in shown.values() if (column := of[reading.name]) is not None]
        for reading in readings
    }
    caption = "Runs side by side at the measured depth nearest to the relative depth."
    return table_of("comparison", "Runs side by side", caption, columns, readings, measured, view)


def _profile(reading: Reading, metric: str, view: Selection) -> Column | None:
    column = column_of(reading.analysis, metric, view)
    # Singular values and modules have no relative depth.
    return column if column is None or column.value.dims[0] in ("depth", "connection") else None


def _nearest(column: Column | None, fraction: float) -> Cell:
    if column is None:
        return Cell()
    along = positions(column.value, str(column.value.dims[0]), "relative")
    # The nearest measured depth and no interpolation: between two depths there is no state.
    return column.cells[int(np.argmin(np.abs(along - fraction)))]


def differences(readings: Sequence[Reading], view: Selection | None = None) -> list[str]:
    """What makes runs hard to compare, a sentence each: other data, other token counts, other precision."""
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
    return [*sentences, *filter(None, [proof_sentence({each.name: each.attrs for each in readings})])]


def _in_short(key: str, value: object) -> str:
    if isinstance(value, float):  # a count, which is a mean where sequences differ
        return f"{value:.7g}"
    # The first letters of a digest tell as much as all 64 of them.
    is_digest = key == "data_digest" and re.fullmatch("[0-9a-f]{16,}", str(value))
    return str(value)[:8] if is_digest else shortened(str(value), LONGEST_NAME)
