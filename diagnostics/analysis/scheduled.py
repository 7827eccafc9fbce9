"""How is a run measured that is larger than memory? A task a depth, tasks of some depths with others, and one for the rest.

What a part has to know of all depths, which tokens are massive, is found first.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import chain as chained
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities import registry
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import chain_dataset, open_run

# Measured: a task takes six to seven depths in memory, and Python with its libraries 0.4 GB once.
DEPTHS_OF_TASK, BYTES_OF_PYTHON = 7, 400_000_000
# Depths of each side of a task of pairs: two sides take no more than what a task of one depth takes.
SIDE = 3
# Where one of these is needed, a value depends on the last depth or on a sum over all: one task reads depth after depth.
OF_ALL_DEPTHS = {"gradient_norms", "token_steps"}
UNDEFINED = "undefined_because"
GIB = 2**30

Progress = Callable[[str, int, int], None]
Found = dict[str, dict[str, xr.DataArray] | str]
"""By metric its variables, or the reason why there are none."""


Source = xr.Dataset | tuple[str, str]
"""Where a task reads a chain: a trace that is open already, or path and chain, which it opens wherever it runs."""


@contextmanager
def _opened(source: Source) -> Iterator[xr.Dataset]:
    if isinstance(source, xr.Dataset):
        yield source
        return
    with open_run(source[0], checksums=False) as run:
        yield trace_of(run, source[1])


def trace_of(run: xr.DataTree, chain: str) -> xr.Dataset:
    """The trace of a chain as metrics take it, with a label for every depth, which parts keep."""
    stored = chain_dataset(run, "trace", chain)
    assert stored is not None
    trace = registry.with_facts(stored, run.attrs)
    found = registry.sources(trace, chain_dataset(run, "statistics", chain))
    is_numbered = "depth" in found.coords or "depth" not in found.dims
    return found if is_numbered else found.assign_coords(depth=np.arange(found.sizes["depth"]))


def measure(
    trace: xr.Dataset,
    place: tuple[str, str],
    metrics: Collection[str],
    scheduler: Any,
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, xr.DataArray], dict[str, str]]:
    """The metrics of one chain, part by part.

    ``place``: path and chain, under which the workers of a client open the trace.
    ``scheduler``: ``"threads"``, or a ``distributed.Client``, whose workers find the run at its path.
    ``memory``: bytes that threads may take together; by default what the machine has free.
    ``progress``: called after each task with (what, number done, number in all).
    Returns: The variables, and the reasons of metrics that were not computed.
    """
    count = trace.sizes.get("depth", 0)
    names: dict[str, list[str]] = {"depth": [], "step": [], "pair": [], "whole": []}
    for name in metrics:
        names[part_of(CATALOGUE[name])].append(name)
    needs_massive = any("massive" in needed_quantities(CATALOGUE[name].function) for name in metrics)
    source: Source = trace if scheduler == "threads" else place
    with _executor(scheduler, trace, memory) as pool:
        facts = [(source, depth) for depth in range(count)] if needs_massive else []
        parts = _run(pool, _massive_of, facts, progress)
        # Without a real token there are none: each metric gives the reason.
        massive = Massive.joined(parts) if parts and None not in parts else None
        sides = [range(first, min(first + SIDE, count)) for first in range(0, count, SIDE)]
        pairs = [sorted({*a, *b}) for a, b in combinations_with_replacement(sides, 2)]
        single = [*names["depth"], *names["step"]]
        blocks: list[tuple[list[str], list[int] | None]] = [
            *([(names["whole"], None)] if names["whole"] else []),
            *((names["pair"], pair) for pair in pairs if names["pair"]),
            *((single, [depth]) for depth in range(count) if single),
        ]
        tasks = [(source, *block, massive) for block in blocks]
        results = _run(pool, _measured, tasks, progress)
    values: dict[str, xr.DataArray] = {}
    reasons: dict[str, str] = {}
    for name in metrics:
        found = [result[name] for result in results if name in result]
        refused = [of for of in found if isinstance(of, str)]
        if refused:
            reasons[name] = refused[0]
            continue
        for variable in found[0]:
            values[variable] = _joined([of[variable] for of in found], Quantities(trace))
    return values, reasons


def part_of(metric: Metric) -> str:
    """What one of its values is computed from: one ``"depth"``, a ``"step"``, a ``"pair"`` of depths, or the ``"whole"``."""
    needed = needed_quantities(metric.function)
    of_states = set(metric.roots) <= {"residual", "gradient"} and not needed & OF_ALL_DEPTHS
    if "depth" not in metric.dims or not of_states:
        return "whole"
    return "pair" if metric.pairwise else "step" if metric.of_steps else "depth"


def needed_quantities(function: Callable[..., Any]) -> set[str]:
    """Names of the derived quantities that a function is computed from."""
    named = set(inspect.signature(function).parameters) & set(registry.QUANTITIES)
    return named.union(*(needed_quantities(registry.QUANTITIES[name]) for name in named))


def _massive_of(source: Source, depth: int) -> Massive | None:
    """Massive activations of one depth; None of a run without a real token."""
    with _opened(source) as trace:
        try:
            found: Massive = Quantities(trace.isel(depth=[depth]))["massive"]
        except Unavailable:
            return None
    return found


def _measured(
    source: Source, names: Sequence[str], depths: list[int] | None, massive: Massive | None
) -> Found:
    """Metrics of some depths; without depths, of all."""
    found: Found = {}
    with _opened(source) as trace:
        for kind in ("step", "other"):
            # A step begins at the depth before, whose own value is none of this part.
            before = [depths[0] - 1] if kind == "step" and depths and depths[0] else []
            at = depths and [*before, *depths]
            quantities = Quantities(trace.isel(depth=at) if at else trace)
            if massive is not None:
                quantities.give("massive", massive.at(at))
            for metric in (CATALOGUE[name] for name in names):
                if (part_of(metric) == "step") != (kind == "step"):
                    continue
                try:
                    values = metric.evaluate(quantities)
                except Unavailable as reason:
                    found[metric.name] = str(reason)
                    continue
                found[metric.name] = {
                    name: quantities.labelled(value).isel(
                        depth=slice(len(before), None), missing_dims="ignore"
                    )
                    for name, value in values.items()
                }
    return found


def _joined(parts: Sequence[xr.DataArray], of_all: Quantities) -> xr.DataArray:
    """A variable of all depths from those of some; one that is not of depths is the same in each part."""
    first = parts[0]
    of_depths = [dim for dim in ("depth", "other_depth") if dim in first.dims]
    whole = first
    if of_depths and len(parts) > 1:
        sizes: dict[Any, int] = {**first.sizes, **dict.fromkeys(of_depths, of_all.trace.sizes["depth"])}
        empty = xr.Variable(first.dims, np.zeros([sizes[dim] for dim in first.dims], first.dtype))
        others = {
            name: of for name, of in first.coords.items() if not set(of.dims) & {"depth", "other_depth"}
        }
        whole = of_all.labelled(empty).assign_coords(others).rename(first.name)
        for part in parts:
            whole.loc[{dim: part[dim] for dim in of_depths}] = part
    attrs: dict[str, Any] = {}
    for name, value in chained.from_iterable(part.attrs.items() for part in parts):
        is_by_depth = isinstance(value, Mapping)
        attrs[name] = {**attrs.get(name, {}), **value} if is_by_depth else attrs.get(name, value)
    if not whole.isnull().all():  # one depth may be undefined where others are not
        attrs.pop(UNDEFINED, None)
    return whole.drop_attrs(deep=False).assign_attrs(attrs)


@contextmanager
def _executor(scheduler: Any, trace: xr.Dataset, memory: int | None) -> Iterator[Executor]:
    """What runs tasks: as many threads as have memory and a processor, or the workers of a client."""
    if scheduler != "threads":
        if not hasattr(scheduler, "get_executor"):
            raise InputError(f"scheduler is {scheduler!r}; expected 'threads' or a distributed.Client")
        yield scheduler.get_executor(pure=False)
        return
    stored = trace["residual"].nbytes if "residual" in trace else 0
    needed = DEPTHS_OF_TASK * max(1, stored // max(1, trace.sizes.get("depth", 1)))
    says_what_is_free = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if says_what_is_free else 4 * GIB
    free = available if memory is None else memory
    fitting = (free - BYTES_OF_PYTHON) // needed
    if memory is not None and fitting < 1:
        raise InputError(
            f"memory is {memory / GIB:.3g} GiB; expected {(BYTES_OF_PYTHON + needed) / GIB:.3g} GiB or more, which one task "
            "takes: give more, or capture fewer sequences"
        )
    with ThreadPoolExecutor(max(1, min(fitting, os.cpu_count() or 1))) as pool:
        yield pool


def _run(
    pool: Executor,
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    progress: Progress | None,
) -> list[Any]:
    """What a function returns for each of several arguments, in their order."""
    futures = [pool.submit(function, *each) for each in arguments]
    try:
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress("parts", done, len(futures))
    finally:
        for future in futures:  # where one raised, the others are of no use
            future.cancel()
    return [future.result() for future in futures]
