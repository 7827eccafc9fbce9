"""What of a run's own arrays does a figure need that an analysis has not? Its mixing matrices, and its history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.readings.saved_history import cells_of
from depthscope.app.text.visible import visible, visible_name
from depthscope.diagnostics import schema, training_curves
from depthscope.diagnostics.errors import AbsentError
from depthscope.diagnostics.kernels.mixing.products import composite


@dataclass(frozen=True, eq=False)
class MixingMatrices:
    """The mixing of one run, as means over its tokens."""

    single: np.ndarray  # H_res of every connection, (connection, n, n); rows are destinations
    names: tuple[str, ...]  # such as ``connection 5: attn of block 2``
    # product from one connection through another, the later one on the left: the mean of the products of each
    # token
    products: Mapping[tuple[int, int], np.ndarray]


@contextmanager
def _trace_of(reading: Reading, runs: Mapping[str, xr.DataTree]) -> Iterator[xr.Dataset | None]:
    run = _run_of(reading, runs)
    if run is not None:
        yield schema.chain_dataset(run, "trace", reading.chain)
    elif reading.path:
        # The run was verified when it was read; only the group that is needed is opened again.
        with ExitStack() as stack:
            trace = None
            with suppress(AbsentError):  # a run of statistics or metrics alone
                trace = stack.enter_context(schema.open_group(reading.path, "trace", reading.chain))
            yield trace
    else:
        yield None


def _run_of(reading: Reading, runs: Mapping[str, xr.DataTree]) -> xr.DataTree | None:
    """The run in memory that a reading is of, by the name that `read_runs` gave it."""
    for name, run in runs.items():
        if visible_name(f"{name}/{reading.chain}" if reading.chain else name) == reading.name:
            return run
    return None


def matrices_of(reading: Reading, runs: Mapping[str, xr.DataTree]) -> MixingMatrices | None:
    """The mixing matrices of a run, and their products over its first half, its second half and the whole.

    ``runs``: runs in memory by the names that `read_runs` was given; of others the file is opened.
    Returns: None for a run without streams, or whose matrices are not stored.
    """
    with _trace_of(reading, runs) as trace:
        if trace is None or "h_res" not in trace:
            return None
        h = trace["h_res"].transpose("connection", ..., *trace["h_res"].dims[-2:])
        real = trace["mask"].values.astype(bool) if "mask" in trace else None
        # One array (connection, token, n, n); matrices of weights alone have no tokens and are one for all.
        values = np.asarray(h.values, dtype=np.float64)
        if real is not None and values.shape[1:3] == real.shape:
            values = values[:, real]
        values = values.reshape(len(values), -1, *values.shape[-2:])
        if not values.size:
            return None
        last, half = len(values) - 1, len(values) // 2
        ranges = dict.fromkeys([(0, half - 1), (half, last), (0, last)] if half else [(0, last)])
        return MixingMatrices(
            values.mean(axis=1),
            tuple(_connection_name(trace, place) for place in range(len(values))),
            {pair: composite(values[pair[0] : pair[1] + 1]).mean(axis=0) for pair in ranges},
        )


def _connection_name(trace: xr.Dataset, connection: int) -> str:
    if "branch" not in trace or "connection_layer" not in trace:
        return f"connection {connection}"
    branch = visible(trace["branch"].values[connection])
    layer = int(trace["connection_layer"].values[connection])
    return f"connection {connection}: {'' if branch == 'block' else f'{branch} of '}block {layer}"


def history_of(reading: Reading, runs: Mapping[str, xr.DataTree]) -> xr.Dataset | None:
    """What was measured at several steps of a training.

    Returns: The analysis where it has several steps, else the curves of the run's statistics; None where neither has.
    """
    if reading.analysis.sizes.get("step", 1) > 1:
        return reading.analysis
    with _run_with_statistics(reading, runs) as run:
        curves = None if run is None else training_curves(run, chain=reading.chain).load()
    return curves if curves is not None and curves.sizes.get("step", 1) > 1 else None


def cells_by_step(reading: Reading, runs: Mapping[str, xr.DataTree]) -> xr.DataArray | None:
    """The elements of H_res, H_pre and H_post at the steps of a training, see `cells_of`.

    Returns: None where fewer than two steps were recorded, or no connection of streams was.
    """
    with _run_with_statistics(reading, runs) as run:
        statistics = None if run is None else schema.chain_dataset(run, "statistics", reading.chain)
        if statistics is None or statistics.sizes.get("step", 1) < 2:
            return None
        return cells_of(statistics)


@contextmanager
def _run_with_statistics(reading: Reading, runs: Mapping[str, xr.DataTree]) -> Iterator[xr.DataTree | None]:
    """The run of a reading, from memory or its file; None without statistics."""
    run = _run_of(reading, runs)
    opened = schema.open_run(Path(reading.path)) if run is None and reading.path else None
    try:
        source = run if run is not None else opened
        has = source is not None and schema.chain_dataset(source, "statistics", reading.chain) is not None
        yield source if has else None
    finally:
        if opened is not None:
            opened.close()
