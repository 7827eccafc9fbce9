"""What does a map of many runs over depth show of each? One number a depth, and where its findings begin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.text.visible import LONGEST_NAME, visible
from depthscope.diagnostics import Finding
from depthscope.diagnostics.verdicts.age import Task
from depthscope.diagnostics.verdicts.causes import depths_of, worst_depth
from depthscope.diagnostics.verdicts.locations import state_name

MOST_CELLS = 240
"""Cells of a row. A deeper run has the worst of neighbours in one cell: no screen shows more."""

VERSION = {"tokens": "all", "centering": "raw", "stream": "mean", "reduction": "mean"}
"""Which of several versions of a metric is shown."""

MOST_POSITIONS = 1024
"""Of a finding's curve in a summary: with more, 500 runs would take megabytes. A heuristic of ours."""

MOST_VALUES = 24
"""An attribute with more values than this, such as a digest, groups nothing."""


class DepthMeasure(NamedTuple):
    """What colours the map."""

    title: str
    limits: tuple[float, float]  # the numbers at the ends of the colours, which are logarithmic
    ends: tuple[str, str]  # what these two numbers mean
    missing: str  # why a run has no such number
    # Whether 1, in the middle, is healthy and both ends are not; else the lower end is not
    is_two_sided: bool = False


MEASURES = {
    "rank": DepthMeasure(
        "effective rank ÷ noise baseline",
        (0.01, 1.0),
        ("collapsed", "as varied as noise"),
        "no rank with a noise baseline was recorded",
    ),
    "tokens": DepthMeasure(
        "Dong residual (how far tokens differ)",
        (0.001, 1.0),
        ("all tokens equal", "tokens differ"),
        "no Dong residual was recorded",
    ),
    "streams": DepthMeasure(
        "differences between streams that survive",
        (0.01, 1.0),
        ("streams are equal", "all survive"),
        "no streams",
    ),
    "gradient": DepthMeasure(
        "gradient norm ÷ median over depth",
        (0.01, 100.0),
        ("vanishes", "explodes"),
        "no gradients were recorded",
        is_two_sided=True,
    ),
}
"""Name in the address → what colours the map; the first one at first."""


@dataclass(frozen=True)
class PlacedFinding:
    """A finding and its depths; None where it is about the whole run or a module."""

    finding: Finding
    first: int | None = None
    worst: int | None = None


@dataclass(frozen=True)
class Summary:
    """What the map shows of one run.

    ``name``: the run's name; ``run/chain`` where it has several chains.
    ``depths``: names of its states.
    ``marks``: findings about the network, worst first.
    ``others``: findings about how far the reading of the network can be trusted.
    ``profiles``: key of `MEASURES` → one number a depth, NaN where it is not defined; without those that the run lacks.
    ``num_steps``: as of a `Reading`.
    """

    name: str
    attrs: Mapping[str, Any]
    depths: tuple[str, ...]
    loss: float | None
    marks: tuple[PlacedFinding, ...]
    others: tuple[PlacedFinding, ...]
    profiles: Mapping[str, tuple[float, ...]]
    num_steps: int = 1

    @property
    def badness(self) -> tuple[Any, ...]:
        """Sort key: more failures first, then more warnings, then the lowest rank."""
        found = [mark.finding.severity.name for mark in self.marks]
        lowest = np.nan_to_num(np.array(self.profiles.get("rank", (1.0,))), nan=0.0).min(initial=1.0)
        return (*(-found.count(each) for each in ("FAIL", "WARN")), float(lowest), self.name)

    def cells(self, measure: str) -> tuple[list[float | None], int]:
        """The numbers of a row in at most `MOST_CELLS` cells, and how many depths a cell is; None is undefined."""
        values = np.array(self.profiles.get(measure, ()), dtype=float)
        block = max(1, math.ceil(len(values) / MOST_CELLS))
        groups = [values[i : i + block] for i in range(0, len(values), block)]
        return [_worst(each, two_sided=MEASURES[measure].is_two_sided) for each in groups], block


def _worst(values: np.ndarray, *, two_sided: bool) -> float | None:
    known = values[np.isfinite(values)]
    # A depth that is not finite is the worst of its neighbours.
    if not known.size or known.size < values.size:
        return None
    with np.errstate(divide="ignore"):
        at = np.argmax(np.abs(np.log(known))) if two_sided else np.argmin(known)
    return float(f"{known[at]:.4g}")


def summary_of(reading: Reading) -> Summary:
    """The summary of a reading."""
    analysis = reading.analysis
    names = _names(analysis)
    marks = [
        PlacedFinding(
            finding if len(finding.profile) <= MOST_POSITIONS else replace(finding, profile=()),
            (range_of(finding, analysis) or (None,))[0],
            worst_depth(finding, analysis),
        )
        for finding in reading.findings
    ]
    return Summary(
        reading.name,
        reading.attrs,
        tuple(names),
        loss_of(reading),
        tuple(mark for mark in marks if mark.finding.about == "network"),
        tuple(mark for mark in marks if mark.finding.about != "network"),
        profiles_of(analysis, len(names)),
        reading.num_steps,
    )


def _names(analysis: xr.Dataset) -> list[str]:
    """What people call each depth."""
    if not {"site", "layer"} <= set(analysis.coords):
        return [f"depth {depth}" for depth in range(analysis.sizes.get("depth", 0))]
    places = zip(analysis["site"].values, analysis["layer"].values, strict=True)
    return [visible(state_name(str(site), int(layer)), longest=LONGEST_NAME) for site, layer in places]


def range_of(finding: Finding, analysis: xr.Dataset) -> tuple[int, int] | None:
    """The first and last depth of a finding; None where it is about the whole run or a module."""
    is_placed = finding.axis in ("depth", "connection") and finding.first >= 0
    return depths_of(finding, analysis) if is_placed else None


def loss_of(reading: Reading) -> float | None:
    """The loss of a run: of its last step, else of its batch, else what its training noted."""
    losses = reading.analysis["loss"].values.ravel() if "loss" in reading.analysis else np.zeros(0)
    training = reading.attrs.get("training")
    noted = training.get("held_out_loss") if isinstance(training, Mapping) else None
    for value in (*losses[-1:], Task.of(reading.attrs).loss, noted):
        if isinstance(value, (int, float, np.floating)) and math.isfinite(value):
            return float(value)
    return None


def profiles_of(analysis: xr.Dataset, depths: int) -> dict[str, tuple[float, ...]]:
    """One number a depth for each of `MEASURES` that a run has."""
    norms = _along_depth(analysis, "gradient_norm", depths)
    if norms is not None:
        known = norms[np.isfinite(norms) & (norms > 0)]
        norms = norms / np.median(known) if known.size else None
    shares = None
    for scope in ("data", "sequence"):
        ranks = _along_depth(analysis, "effective_rank", depths, scope)
        null = _slice(analysis, "effective_rank_null", scope)
        # The rank of one token is 1 whatever the network does: then all sequences are taken together.
        if ranks is not None and null is not None and float(null.max()) > 1:
            shares = np.asarray(ranks / np.broadcast_to(null.values, ranks.shape), dtype=float)
    found = {
        "rank": shares,
        "tokens": _along_depth(analysis, "dong_residual", depths),
        "streams": _along_depth(analysis, "deflated_gain", depths),
        "gradient": norms,
    }
    return {name: tuple(values.tolist()) for name, values in found.items() if values is not None}


def _slice(analysis: xr.Dataset, metric: str, scope: str) -> xr.DataArray | None:
    """A metric at the last step in the version that figures show at first; None where the run lacks it."""
    if metric not in analysis:
        return None
    values = analysis[metric]
    at: dict[str, int] = {"step": -1} if "step" in values.dims else {}
    for dim, label in {**VERSION, "scope": scope}.items():
        if dim in values.dims:
            labels = values[dim].values.tolist()
            if label not in labels:
                return None
            at[dim] = labels.index(label)
    return values.isel(at)


def _along_depth(
    analysis: xr.Dataset, metric: str, depths: int, scope: str = "sequence"
) -> np.ndarray | None:
    """A metric at each depth; of connections at the depth that each writes, and at the embedding 1: nothing is mixed yet."""
    values = _slice(analysis, metric, scope)
    if values is None or not bool(values.notnull().any()):
        return None
    numbers = np.asarray(values.values, dtype=float)
    if values.dims == ("depth",):
        return numbers
    if values.dims != ("connection",):
        return None
    known = "depth_out" in analysis.coords
    places = analysis["depth_out"].values.astype(int) if known else np.arange(1, len(numbers) + 1)
    # A state that no connection writes, such as one behind the last norm, has what the one before it has.
    order = np.argsort(places, kind="stable")
    last = np.searchsorted(places[order], np.arange(depths), side="right") - 1
    return np.where(last < 0, 1.0, numbers[order][last])


def groupable(summaries: Sequence[Summary]) -> list[str]:
    """Attributes by which runs can be grouped: few plain values that differ."""
    found: dict[str, set[Any]] = {}
    for summary in summaries:
        for name, value in plain_attributes(summary.attrs).items():
            found.setdefault(name, set()).add(value)
    return sorted(name for name, values in found.items() if 1 < len(values) <= MOST_VALUES)


def plain_attributes(attrs: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Attributes that are one word or number; a value in a mapping such as a configuration has the name ``mapping.name``."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in attrs.items():
        is_mapping = isinstance(value, Mapping)
        parts = {f"{name}.{part}": each for part, each in value.items()} if is_mapping else {name: value}
        found |= {str(key): each for key, each in parts.items() if isinstance(each, (str, int, float, bool))}
    return found
