"""How are runs measured by workers? Facts of the complete run first, then every task, then what one lost, metric by metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr

from depthscope.diagnostics.analysis.scheduled.joining import joined
from depthscope.diagnostics.analysis.scheduled.splitting import COPIES, MOST_POSITIONS, Chain, tasks_of
from depthscope.diagnostics.analysis.scheduled.tasks import (
    SEQUENCE,
    Facts,
    Task,
    TaskResult,
    blocks_of,
    chain_trace,
    find_facts,
    needed_quantities,
    run_task,
)
from depthscope.diagnostics.analysis.scheduled.workers import LostWorker, run_all, task_budget
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ChainOfRun:
    """One chain of a saved run."""

    run: str  # the run's name
    path: str  # where all workers read it
    chain: str  # empty where the run has one
    attrs: Mapping[str, Any]  # attributes of the run


Found = tuple[dict[str, xr.DataArray], dict[str, str]]


def measure_chains(
    client: Any, chains: Sequence[ChainOfRun], metrics: Sequence[str], progress: Progress | None
) -> list[Found]:
    """Measure several chains, of one run or of many, on the workers of a cluster.

    ``progress``: called with (what, number of tasks done, number in all).
    Returns: For each chain the variables, and the reasons of metrics that were not computed.
    """
    budget = task_budget(client)
    tasks: list[tuple[int, Task]] = []
    refused: list[dict[str, str]] = []
    for number, chain in enumerate(chains):
        with chain_trace(chain.path, chain.chain, chain.attrs) as trace:
            of_chain, too_large = tasks_of(Chain(chain.run, chain.path, chain.chain, trace, budget), metrics)
        tasks += [(number, task) for task in of_chain]
        refused.append(too_large)
    facts = _facts(client, chains, tasks, budget, progress)
    # Sent once to each worker, and not with every task.
    sent = {number: client.scatter(found) for number, found in facts.items()}
    arguments = [(task, chains[number].attrs, sent.get(number)) for number, task in tasks]
    results = run_all(client, run_task, arguments, _reporter("metrics", len(tasks), progress))
    results = _one_by_one(client, arguments, results, progress)
    parts: list[list[tuple[Task, dict[str, TaskResult]]]] = [[] for _ in chains]
    for (number, task), result in zip(tasks, results, strict=True):
        parts[number].append((task, result))
    found: list[Found] = []
    for of_one, too_large in zip(parts, refused, strict=True):
        variables, reasons = joined(of_one)
        found.append((variables, {**reasons, **too_large}))
    return found


def _reporter(what: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    return lambda done: progress(what, done, total) if progress else None


def _facts(
    client: Any,
    chains: Sequence[ChainOfRun],
    tasks: Sequence[tuple[int, Task]],
    budget: int,
    progress: Progress | None,
) -> dict[int, Facts]:
    """What parts have to know of the complete run, by the number of the chain; of those whose metrics ask for it."""
    arguments: list[tuple[Any, ...]] = []
    owners: list[int] = []
    of_chains: list[list[Task]] = [[] for _ in chains]
    for number, task in tasks:
        of_chains[number].append(task)
    for number, chain in enumerate(chains):
        own = of_chains[number]
        names = {name for task in own for name in task.metrics}
        has_massive = any("massive" in needed_quantities(CATALOGUE[name].function) for name in names)
        if not has_massive and not any(task.kind == SEQUENCE for task in own):
            continue
        with chain_trace(chain.path, chain.chain, chain.attrs) as trace:
            one_depth = max(1, trace["residual"].nbytes // trace.sizes["depth"])
            blocks = blocks_of(
                trace.sizes["depth"], max(1, min(MOST_POSITIONS, budget // (COPIES * one_depth)))
            )
        arguments += [(chain.path, chain.chain, chain.attrs, block, has_massive) for block in blocks]
        owners += [number] * len(blocks)
    parts = run_all(client, find_facts, arguments, _reporter("all depths", len(arguments), progress))
    found: dict[int, Facts] = {}
    for number in dict.fromkeys(owners):
        of_chain = [part for owner, part in zip(owners, parts, strict=True) if owner == number]
        # Without it each task of the chain looks for itself, and gives the reason where it cannot.
        if all(isinstance(part, Facts) for part in of_chain):
            found[number] = Facts.joined(of_chain)
    return found


def _one_by_one(
    client: Any, arguments: Sequence[tuple[Any, ...]], results: Sequence[Any], progress: Progress | None
) -> list[dict[str, TaskResult]]:
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
    complete: list[dict[str, TaskResult]] = [
        {} if isinstance(result, LostWorker) else result for result in results
    ]
    for (number, (task, *_)), result in zip(again, repeated, strict=True):
        if isinstance(result, LostWorker):
            reason = f"the worker was lost, as one is that takes more memory than its limit, while it measured {task}"
            result = {task.metrics[0]: ({}, reason)}
        complete[number] |= result
    return complete
