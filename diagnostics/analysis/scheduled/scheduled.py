"""How are runs measured by workers? Massive tokens first, then every task, then what one lost is tried metric by metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr

from depthscope.diagnostics.analysis.scheduled.joining import joined
from depthscope.diagnostics.analysis.scheduled.tasks import (
    COPIES,
    Measured,
    Task,
    chain_trace,
    depth_blocks,
    find_massive,
    needed_quantities,
    run_task,
    tasks_of,
)
from depthscope.diagnostics.analysis.scheduled.workers import LostWorker, run_all, task_budget
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.tokens import Massive

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ChainOfRun:
    """One chain of a saved run.

    Parameters
    ----------
    run : str
        The run's name.
    path : str
        Where all workers read it.
    chain : str
        Empty where the run has one.
    attrs : Mapping
        Attributes of the run.
    """

    run: str
    path: str
    chain: str
    attrs: Mapping[str, Any]


Found = tuple[dict[str, xr.DataArray], dict[str, str]]


def measure_chains(
    client: Any, chains: Sequence[ChainOfRun], metrics: Sequence[str], progress: Progress | None
) -> list[Found]:
    """Measure several chains, of one run or of many, on the workers of a cluster.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    chains : sequence of ChainOfRun
        Each with a trace.
    metrics : sequence of str
        By name.
    progress : function, optional
        Called with (what, number of tasks done, number in all).

    Returns
    -------
    list of (dict, dict)
        For each chain the variables, and the reasons of metrics that were not computed.
    """
    budget = task_budget(client)
    tasks: list[tuple[ChainOfRun, Task]] = []
    for chain in chains:
        with chain_trace(chain.path, chain.chain, chain.attrs) as trace:
            tasks += [
                (chain, task) for task in tasks_of(chain.run, chain.path, chain.chain, trace, metrics, budget)
            ]
    massive = _massive_tokens(client, chains, [task for _, task in tasks], budget, progress)
    # Sent once to each worker, and not with every task.
    sent = {number: client.scatter(found) for number, found in massive.items()}
    arguments = [(task, chain.attrs, sent.get(chains.index(chain))) for chain, task in tasks]
    results = run_all(client, run_task, arguments, _reporter("metrics", len(tasks), progress))
    results = _one_by_one(client, arguments, results, progress)
    return [
        joined([(task, found) for (of, task), found in zip(tasks, results, strict=True) if of is chain])
        for chain in chains
    ]


def _reporter(what: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    return lambda done: progress(what, done, total) if progress else None


def _massive_tokens(
    client: Any, chains: Sequence[ChainOfRun], tasks: Sequence[Task], budget: int, progress: Progress | None
) -> dict[int, Massive]:
    """Which tokens are massive at any depth, by the number of the chain; of those whose metrics ask for it."""
    arguments: list[tuple[Any, ...]] = []
    owners: list[int] = []
    for number, chain in enumerate(chains):
        names = {
            name
            for task in tasks
            if (task.run, task.chain) == (chain.run, chain.chain)
            for name in task.metrics
        }
        if not any("massive" in needed_quantities(CATALOGUE[name].function) for name in names):
            continue
        with chain_trace(chain.path, chain.chain, chain.attrs) as trace:
            one_depth = max(1, trace["residual"].nbytes // trace.sizes["depth"])
            blocks = depth_blocks(trace.sizes["depth"], max(1, min(8, budget // (COPIES * one_depth))))
        arguments += [(chain.path, chain.chain, chain.attrs, block) for block in blocks]
        owners += [number] * len(blocks)
    parts = run_all(client, find_massive, arguments, _reporter("massive tokens", len(arguments), progress))
    found: dict[int, Massive] = {}
    for number in dict.fromkeys(owners):
        of_chain = [part for owner, part in zip(owners, parts, strict=True) if owner == number]
        # Without it each task of the chain looks for itself, and says why it cannot.
        if all(isinstance(part, Massive) for part in of_chain):
            found[number] = Massive.joined(of_chain)
    return found


def _one_by_one(
    client: Any, arguments: Sequence[tuple[Any, ...]], results: Sequence[Any], progress: Progress | None
) -> list[dict[str, Measured]]:
    """The results, with those of tasks that lost their worker measured once more, one metric at a time."""
    lost = [number for number, result in enumerate(results) if isinstance(result, LostWorker)]
    again = [
        (number, (replace(arguments[number][0], metrics=(name,)), *arguments[number][1:]))
        for number in lost
        for name in arguments[number][0].metrics
    ]
    repeated = run_all(
        client, run_task, [of for _, of in again], _reporter("lost tasks", len(again), progress)
    )
    complete: list[dict[str, Measured]] = [
        {} if isinstance(result, LostWorker) else result for result in results
    ]
    for (number, (task, *_)), result in zip(again, repeated, strict=True):
        if isinstance(result, LostWorker):
            reason = f"the worker was lost, as one is that takes more memory than its limit, while it measured {task}"
            result = {task.metrics[0]: ({}, reason)}
        complete[number] |= result
    return complete
