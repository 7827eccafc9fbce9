"""On what do the tasks of an analysis run? Workers of dask: of this machine, or of a cluster that is there already."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import pydoc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from depthscope.diagnostics.errors import AbsentError, DepthscopeError, InputError, StorageError
from depthscope.diagnostics.package_versions import DEPTHSCOPE

DEFAULT_BUDGET = 2 * 2**30
"""Bytes that a task may take on a worker that states no limit. Heuristic."""

SECONDS_TO_CONNECT = 20
SECONDS_WITHOUT_WORKERS = 30  # a worker that was lost is back by then, where it is started again. Heuristic.
SECONDS_BETWEEN_LOOKS = 0.02

_OF_OWN_WORKERS = {
    # How often a task is tried again whose worker was lost: with a worker goes whatever waited there, and one that is lost
    # while it starts or ends takes along a task that has done nothing. Heuristic.
    "distributed.scheduler.allowed-failures": 2,
    # A worker gets a task when it is free and not before: what waits there is lost with it.
    "distributed.scheduler.worker-saturation": 1.0,
    # Samples of what a worker's threads do took a third of its processor time on a busy machine, and nobody reads them here.
    "distributed.worker.profile.enabled": False,
    # By default dask lets the C library give each array of 128 KiB back at once: measured, 93 000 page faults in place of
    # 129, and 2.7 times the processor time of a metric that goes through its tokens block by block.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 16 * 2**20,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 4 * 2**20,
}
"""Settings of dask for workers that are started here."""

_AGAIN = "look at it and call this again, nothing was saved"

Report = Callable[[int], None]
"""Takes the number of tasks that are done."""


class LostWorker(DepthscopeError, RuntimeError):
    """A task whose worker died, mostly because it took more memory than its limit."""


@contextmanager
def workers(scheduler: Any, *, count: int | None = None, memory: int | None = None) -> Iterator[Any]:
    """The client of a cluster; one that is made here is closed at the end.

    ``scheduler``: ``"threads"`` or ``"processes"`` of this machine; the address of a scheduler, such as
    ``"tcp://10.0.0.1:8786"``; or a client.
    ``count``: workers of this machine; by default one for each processor.
    ``memory``: bytes that each of them may take; by default its share of the machine's.
    """
    import dask
    import distributed
    from distributed.utils import silence_logging_cmgr

    if isinstance(scheduler, distributed.Client):
        yield scheduler
        return
    if scheduler in ("threads", "processes"):
        processes = scheduler == "processes"
        number = count or os.cpu_count() or 1
        # Nothing listens on any port but to this machine.
        with (
            dask.config.set(_OF_OWN_WORKERS),
            distributed.LocalCluster(
                n_workers=number if processes else 1,
                threads_per_worker=1 if processes else number,
                processes=processes,
                memory_limit=memory or "auto",
                dashboard_address="127.0.0.1:0",  # any port that is free
                silence_logs=50,  # a lost worker is reported once, with what it was measuring
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    if not isinstance(scheduler, str) or "://" not in scheduler:
        raise InputError(
            f"scheduler is {scheduler!r}; expected 'threads', 'processes', the address of a scheduler such as "
            "'tcp://10.0.0.1:8786', or a distributed.Client"
        )
    try:
        client = distributed.Client(scheduler, timeout=SECONDS_TO_CONNECT)
    except OSError as error:
        raise StorageError(
            f"no scheduler answers at {scheduler} within {SECONDS_TO_CONNECT} s; start one with: dask scheduler"
        ) from error
    # Of a scheduler that is gone dask logs a page: it is said once, in a sentence.
    with silence_logging_cmgr(logging.CRITICAL + 1), client:
        require_same_version(client)
        yield client


def require_same_version(client: Any) -> None:
    """Refuse workers that have another version of this package, or none: they would measure something else."""
    # By a function of Python itself, which every worker has.
    found = client.run(pydoc.locate, "depthscope.diagnostics.package_versions.DEPTHSCOPE", on_error="return")
    other = {address: version or "none" for address, version in found.items() if version != DEPTHSCOPE}
    if other:
        address, version = next(iter(other.items()))
        raise InputError(
            f"{len(other)} of {len(found)} workers have another depthscope: {version} at {address}, and {DEPTHSCOPE} here; "
            "start them in the same environment"
        )


def task_budget(client: Any) -> int:
    """Bytes that one task may take: the smallest worker's limit, shared by its threads, less what Python itself takes."""
    known = client.scheduler_info(n_workers=-1)["workers"].values()
    if not known:
        raise StorageError("the cluster has no worker; start one with: dask worker ADDRESS")
    limits = [(worker["memory_limit"] or DEFAULT_BUDGET) // worker["nthreads"] for worker in known]
    # From 70 % of the limit on a worker pauses; numpy, scipy and xarray take 200 MB.
    return max(2**26, int(0.7 * min(limits)) - 200 * 2**20)


def run_all(
    client: Any, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], report: Report
) -> list[Any]:
    """Call a function with each of several arguments on the workers.

    ``report``: called after each call that is done.
    Returns: In the order of the arguments: what was returned, or a `LostWorker` where the worker died.
    """
    futures = [client.submit(function, *of_one, pure=False) for of_one in arguments]
    positions = {future.key: number for number, future in enumerate(futures)}
    results: list[Any] = [None] * len(futures)
    try:
        for done, future in enumerate(_as_completed(client, futures), 1):
            results[positions[future.key]] = _result(future)
            report(done)
    finally:
        # Where one raised, the others are of no use; a scheduler that is gone has forgotten them.
        with suppress(Exception):
            client.cancel(futures, force=True)
    return results


def _as_completed(client: Any, futures: Sequence[Any]) -> Iterator[Any]:
    """Futures as they end.

    Raises StorageError: Where the scheduler is gone, or no worker has been there for `SECONDS_WITHOUT_WORKERS`: they
    would never end.
    """
    import distributed

    waiting = distributed.as_completed(futures)
    last_seen = time.monotonic()
    while not waiting.is_empty():
        ended = waiting.next_batch(block=False)
        yield from ended
        if ended:
            last_seen = time.monotonic()
            continue
        if client.status != "running":
            raise StorageError(
                f"the scheduler does not answer any more (the client is {client.status}): {_AGAIN}"
            )
        if time.monotonic() - last_seen > SECONDS_WITHOUT_WORKERS:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                raise StorageError(f"the cluster has had no worker for {SECONDS_WITHOUT_WORKERS} s: {_AGAIN}")
            last_seen = time.monotonic()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _result(future: Any) -> Any:
    """What a task returned, or a `LostWorker`."""
    import distributed

    try:
        return future.result()
    except distributed.KilledWorker as error:
        return LostWorker(str(error))
    except (concurrent.futures.CancelledError, asyncio.CancelledError) as error:
        # Of Python's own, which is no Exception: nobody here has cancelled it.
        raise StorageError(
            f"the scheduler has dropped a task, as one does that is stopped: {_AGAIN}"
        ) from error
    except FileNotFoundError as error:
        raise AbsentError(
            f"a worker does not find the run ({error}); it must be where every worker reads it, under the same path"
        ) from error
