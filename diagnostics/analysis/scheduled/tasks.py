"""Which tasks make an analysis? Metrics by blocks of depths where each depth, step or pair stands alone, else over all.

A task names a run by its path, and the worker that runs it reads what the task needs: no array of states is sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import Any

import xarray as xr

from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities import registry
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema.opening import open_group

DEPTH, STEP, PAIR, WHOLE = "depth", "step", "pair", "whole"

# Quantities that compare a depth with the first, the last or all of them.
OVER_ALL_DEPTHS = frozenset(("token_steps", "gradient_norms"))
STATES = frozenset(("residual", "gradient"))
# What float64 copies of one depth's states take, in sizes of its stored states: measured on `token_steps`, the largest.
COPIES = 10
MOST_DEPTHS = 8  # of one task, so that progress is shown and a lost worker loses little. Heuristic.

Measured = tuple[dict[str, xr.DataArray], str]
"""The variables of one metric and "", or none and the reason."""


def separable_by(metric: Metric) -> str:
    """Whether a metric's value at one depth, step or pair of depths depends on those states alone.

    Parameters
    ----------
    metric : Metric
        Of the catalogue.

    Returns
    -------
    str
        ``"depth"``, ``"step"`` or ``"pair"``; ``"whole"`` where it needs all depths, or is of connections or weights. Which
        tokens are massive depends on all depths, and is found before.
    """
    if "depth" not in metric.dims or not set(metric.roots) <= STATES:
        return WHOLE
    if OVER_ALL_DEPTHS & needed_quantities(metric.function):
        return WHOLE
    if metric.pairwise:
        return PAIR
    return STEP if metric.of_steps else DEPTH


def needed_quantities(function: Callable[..., Any]) -> set[str]:
    """Names of the derived quantities that a function is computed from.

    Parameters
    ----------
    function : function
        Its parameters name quantities.

    Returns
    -------
    set of str
    """
    found: set[str] = set()
    for name in inspect.signature(function).parameters:
        if name in registry.QUANTITIES:
            found |= {name} | needed_quantities(registry.QUANTITIES[name])
    return found


@dataclass(frozen=True)
class Task:
    """Some metrics of some depths of one chain of a run.

    Parameters
    ----------
    run : str
        Its name among those that are analysed.
    path : str
        Of the file.
    chain : str
        Empty where the run has one.
    kind : str
        As of `separable_by`.
    metrics : tuple of str
        By name.
    depths : tuple of int
        Positions on the depth axis; of a step with the one before, of a pair both blocks. Empty for all.
    keep : tuple of int
        Positions whose values are kept; of a pair of blocks those of the first one.
    """

    run: str
    path: str
    chain: str
    kind: str
    metrics: tuple[str, ...]
    depths: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" at depths {self.depths[0]} to {self.depths[-1]}" if self.depths else ""
        chain = f" of {self.chain}" if self.chain else ""
        return f"{', '.join(self.metrics)}{where}{chain} of {self.run}"


def chain_trace(
    path: str, chain: str, attrs: Mapping[str, Any], *, max_bytes: int | None = None
) -> xr.Dataset:
    """The trace of one chain with what its metrics need of the statistics; arrays are read when they are used.

    Parameters
    ----------
    path, chain : str
        Of the run.
    attrs : mapping
        Attributes of the run.
    max_bytes : int, optional
        As in `open_run`.

    Returns
    -------
    Dataset
        To be closed by the caller.
    """
    trace = open_group(path, "trace", chain, max_bytes=max_bytes)
    try:
        statistics = open_group(path, "statistics", chain, max_bytes=max_bytes)
    except (FileNotFoundError, ValueError):  # a run may have none
        statistics = None
    found = registry.sources(registry.with_facts(trace, attrs), statistics)
    found.set_close(trace.close)
    return found


def run_task(task: Task, attrs: Mapping[str, Any], massive: Massive | None) -> dict[str, Measured]:
    """Measure the metrics of one task, on whichever worker it lands.

    Parameters
    ----------
    task : Task
        The task.
    attrs : mapping
        Attributes of the run.
    massive : Massive or None
        Which tokens are massive at any depth, where a metric needs that.

    Returns
    -------
    dict of str to Measured
    """
    with chain_trace(task.path, task.chain, attrs) as trace:
        part = trace.isel(depth=list(task.depths)) if task.depths else trace
        source = Quantities(part)
        if massive is not None:
            source.give("massive", massive.at(list(task.depths) or None))
        return {name: _measured(CATALOGUE[name], source, task) for name in task.metrics}


def _measured(metric: Metric, source: Quantities, task: Task) -> Measured:
    try:
        found = metric.evaluate(source)
    except Unavailable as reason:
        return {}, str(reason)
    return {name: _kept(value, task).load() for name, value in found.items()}, ""


def _kept(value: xr.DataArray, task: Task) -> xr.DataArray:
    """What a task keeps of a value: not the depth that a step begins at."""
    if not task.depths or "depth" not in value.dims or task.kind == PAIR:
        return value
    return value.isel(depth=[task.depths.index(position) for position in task.keep])


def find_massive(path: str, chain: str, attrs: Mapping[str, Any], depths: Sequence[int]) -> Massive | None:
    """The massive activations of some depths, on whichever worker this lands.

    Parameters
    ----------
    path, chain : str
        Of the run.
    attrs : mapping
        Its attributes.
    depths : sequence of int
        Positions on the depth axis.

    Returns
    -------
    Massive or None
        None where it is not defined, as of a run without a real token: the metrics that need it say why.
    """
    with chain_trace(path, chain, attrs) as trace:
        try:
            found: Massive = Quantities(trace.isel(depth=list(depths)))["massive"]
        except Unavailable:
            return None
        return found


def depth_blocks(num_depths: int, size: int) -> list[list[int]]:
    """Positions on the depth axis in blocks of about equal size, each of at most ``size``.

    Parameters
    ----------
    num_depths, size : int
        How many depths there are, and how many a block may have.

    Returns
    -------
    list of list of int

    Examples
    --------
    >>> depth_blocks(5, 2)
    [[0], [1, 2], [3, 4]]
    """
    count = -(-num_depths // size)
    cuts = [number * num_depths // count for number in range(count + 1)]
    return [list(range(a, b)) for a, b in pairwise(cuts)]


def tasks_of(
    run: str, path: str, chain: str, trace: xr.Dataset, metrics: Iterable[str], budget: int
) -> list[Task]:
    """The tasks of one chain; those that take longest first.

    Parameters
    ----------
    run, path, chain : str
        Which chain of which run.
    trace : Dataset
        Its trace, of which only sizes are read.
    metrics : iterable of str
        Their names.
    budget : int
        Bytes that a task may take.

    Returns
    -------
    list of Task
    """
    kinds: dict[str, list[str]] = {DEPTH: [], STEP: [], PAIR: [], WHOLE: []}
    for name in metrics:
        kinds[separable_by(CATALOGUE[name])].append(name)
    num_depths = trace.sizes["depth"]
    tasks = [
        Task(run, path, chain, WHOLE, tuple(names)) for names in _with_common_roots(kinds[WHOLE]).values()
    ]
    one_depth = max(1, trace["residual"].nbytes // num_depths)
    blocks = depth_blocks(num_depths, min(MOST_DEPTHS, max(1, budget // (COPIES * one_depth))))
    if kinds[PAIR]:
        # All states of both blocks at once, the mean over streams alone, and float64 copies of them.
        pair_bytes = COPIES * one_depth // trace.sizes["stream"]
        in_pairs = depth_blocks(num_depths, max(1, budget // (2 * pair_bytes)))
        for first, second in combinations_with_replacement(in_pairs, 2):
            both = first if first is second else [*first, *second]
            tasks.append(Task(run, path, chain, PAIR, tuple(kinds[PAIR]), tuple(both), tuple(first)))
    for block in blocks:
        for kind, before in ((DEPTH, []), (STEP, [block[0] - 1] if block[0] else [])):
            if kinds[kind]:
                tasks.append(
                    Task(run, path, chain, kind, tuple(kinds[kind]), (*before, *block), tuple(block))
                )
    return tasks


def _with_common_roots(names: Iterable[str]) -> dict[str, list[str]]:
    """Metrics over all depths by what they read first, so that those of one task share quantities."""
    groups: dict[str, list[str]] = {}
    for name in names:
        roots = CATALOGUE[name].roots
        groups.setdefault("h_res" if "h_res" in roots else "".join(roots[:1]), []).append(name)
    return groups
