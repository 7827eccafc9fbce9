"""Which tasks make an analysis? Blocks of depths, pairs, connections or sequences where these stand alone, else all at once.

A task names a run by its path, and the worker that runs it reads what the task needs: no array of states is sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities import registry
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.states import States
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema.opening import open_group

KINDS = ("depth", "step", "pair", "connection", "sequence", "whole")
DEPTH, STEP, PAIR, CONNECTION, SEQUENCE, WHOLE = KINDS

# Of these two a value depends on the last depth, or on the sum over all of them.
LAST_DEPTH, ALL_STEPS = "gradient_norms", "token_steps"
STATES = frozenset(("residual", "gradient"))

TaskResult = tuple[dict[str, xr.DataArray], str]
"""The variables of one metric and "", or none and the reason."""


def separable_by(metric: Metric) -> str:
    """Of what a part of a metric's values is computed alone.

    Returns: ``"depth"``, ``"step"`` (two depths in a row), ``"pair"`` (two depths), ``"connection"``, ``"sequence"``
    (all depths of it), or ``"whole"``. Which tokens are massive depends on all depths, and is found before.
    """
    if metric.separable:
        return CONNECTION
    needed = needed_quantities(metric.function)
    if "depth" not in metric.dims or not set(metric.roots) <= STATES or LAST_DEPTH in needed:
        return WHOLE
    if ALL_STEPS in needed:
        return SEQUENCE
    if metric.pairwise:
        return PAIR
    return STEP if metric.of_steps else DEPTH


def needed_quantities(function: Callable[..., Any]) -> set[str]:
    """Names of the derived quantities that a function is computed from."""
    found: set[str] = set()
    for name in inspect.signature(function).parameters:
        if name in registry.QUANTITIES:
            found |= {name} | needed_quantities(registry.QUANTITIES[name])
    return found


@dataclass(frozen=True)
class Task:
    """Some metrics of a part of one chain of a run."""

    run: str  # its name among those that are analysed
    path: str  # of the file
    chain: str  # empty where the run has one
    # as of `separable_by`; ``"depth"`` also for steps, which read the same depths and the one before
    kind: str
    metrics: tuple[str, ...]  # by name
    # what is read: positions on the axis of depths, connections or sequences; of a pair both blocks. Empty
    # for all
    positions: tuple[int, ...] = ()
    # positions whose values are stored; of a pair of blocks those of the first one
    keep: tuple[int, ...] = ()
    cache_bytes: int = 0  # most bytes of states that are cached from one metric to the next

    def __str__(self) -> str:
        what = "depth" if self.kind == PAIR else self.kind
        where = f" at {what}s {self.positions[0]} to {self.positions[-1]}" if self.positions else ""
        chain = f" of {self.chain}" if self.chain else ""
        return f"{', '.join(self.metrics)}{where}{chain} of {self.run}"


def chain_trace(path: str, chain: str, attrs: Mapping[str, Any]) -> xr.Dataset:
    """The trace of one chain with what its metrics need of the statistics; arrays are read when they are used."""
    trace = open_group(path, "trace", chain)
    try:
        statistics = open_group(path, "statistics", chain)
    except (FileNotFoundError, ValueError):  # a run may have none
        statistics = None
    found = registry.sources(registry.with_facts(trace, attrs), statistics)
    # Of a part the labels stay those of the complete trace.
    found = found.assign_coords(
        {
            name: np.arange(found.sizes[name])
            for name in ("depth", "connection")
            if name in found.sizes and name not in found.coords
        }
    )
    found.set_close(trace.close)
    return found


def run_task(task: Task, attrs: Mapping[str, Any], facts: Facts | None) -> dict[str, TaskResult]:
    """Measure the metrics of one task, on whichever worker it lands.

    ``facts``: what it has to know of the complete run, where a metric needs that.
    """
    massive = None if facts is None else facts.massive
    with chain_trace(task.path, task.chain, attrs) as trace:
        if task.kind == DEPTH:
            return _measure_depths(task, trace, massive)
        axis = {CONNECTION: "connection", SEQUENCE: "sample"}.get(task.kind, "depth")
        source = Quantities(trace.isel({axis: list(task.positions)}) if task.positions else trace)
        if massive is not None:
            source.give("massive", massive.at(list(task.positions) if task.kind == PAIR else None))
        if task.kind == SEQUENCE and facts is not None:
            part = source.trace
            source.give("residual_states", States(part["residual"], part["mask"], finite=facts.finite))
        return {name: _measured(CATALOGUE[name], source, task) for name in task.metrics}


def _measure_depths(task: Task, trace: xr.Dataset, massive: Massive | None) -> dict[str, TaskResult]:
    """Metrics of depths and of steps: the latter also read the depth before, and each depth is read once."""
    sources = {}
    for kind, positions in ((STEP, list(task.positions)), (DEPTH, list(task.keep))):
        sources[kind] = Quantities(trace.isel(depth=positions))
        if massive is not None:
            sources[kind].give("massive", massive.at(positions))
    with suppress(Unavailable):  # then each metric gives the reason
        states = States(sources[STEP].trace["residual"], sources[STEP]["mask"], cache_bytes=task.cache_bytes)
        sources[STEP].give("residual_states", states)
        kept = [task.positions.index(position) for position in task.keep]
        sources[DEPTH].give("residual_states", states.at(kept))
    found = {}
    for name in task.metrics:
        kind = separable_by(CATALOGUE[name])
        values, reason = _measured(CATALOGUE[name], sources[kind], task)
        if kind == STEP:  # not the depth that the first step begins at
            values = {
                key: value.isel(depth=slice(len(task.positions) - len(task.keep), None))
                if "depth" in value.dims
                else value
                for key, value in values.items()
            }
        found[name] = values, reason
    return found


def _measured(metric: Metric, source: Quantities, task: Task) -> TaskResult:
    try:
        if task.kind != SEQUENCE:
            found = metric.evaluate(source)
        else:  # values of each sequence are joined before their mean is taken
            of_each = metric.unfolded(source)
            assert isinstance(of_each, xr.DataArray)
            found = {metric.name: of_each}
    except Unavailable as reason:
        return {}, str(reason)
    return {name: value.load() for name, value in found.items()}, ""


@dataclass(frozen=True)
class Facts:
    """What each part of a run has to know of all of it."""

    # which tokens are massive at any depth; None where that is not defined, or not asked for
    massive: Massive | None
    finite: np.ndarray  # which streams of each depth are finite, (L, n)

    @classmethod
    def joined(cls, parts: Sequence[Facts]) -> Facts:
        """The facts of blocks of depths together.

        ``parts``: in depth order, of the same tokens.
        """
        massive = [part.massive for part in parts if part.massive is not None]
        return cls(
            Massive.joined(massive) if len(massive) == len(parts) else None,
            np.concatenate([part.finite for part in parts]),
        )


def find_facts(
    path: str, chain: str, attrs: Mapping[str, Any], depths: Sequence[int], has_massive: bool
) -> Facts | None:
    """What some depths contribute to these facts, on whichever worker this runs.

    Returns: None of a run without a real token: the metrics give the reason.
    """
    with chain_trace(path, chain, attrs) as trace:
        source = Quantities(trace.isel(depth=list(depths)))
        try:
            finite = source["residual_states"].finite_streams
        except Unavailable:
            return None
        return Facts(source["massive"] if has_massive else None, finite)


def blocks_of(count: int, size: int) -> list[list[int]]:
    """Positions on an axis in blocks of about equal size, each of at most ``size``.

    ``count, size``: how many positions there are, and how many a block may have.

    Examples
    --------
    >>> blocks_of(5, 2)
    [[0], [1, 2], [3, 4]]
    """
    num_blocks = -(-count // size)
    cuts = [number * count // num_blocks for number in range(num_blocks + 1)]
    return [list(range(a, b)) for a, b in pairwise(cuts)]
