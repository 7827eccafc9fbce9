"""What of a run's arrays does a figure need that an analysis has not? Matrices, history, stored metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.readings.readings import LIVE, Reading, with_live
from depthscope.app.text.visible import visible_name
from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import AbsentError, InputError
from depthscope.diagnostics.kernels.mixing.products import composite
from depthscope.diagnostics.schema.groups import group_path


@dataclass(frozen=True, eq=False)
class MixingMatrices:
    """The mixing of one run, as means over its tokens."""

    single: np.ndarray  # H_res of every connection, (connection, n, n); rows are destinations
    # product from one connection through another, the later one on the left: the mean of the products of each
    # token
    products: Mapping[tuple[int, int], np.ndarray]


@contextmanager
def group_of(
    reading: Reading, group: str, runs: Mapping[str, xr.DataTree] = MappingProxyType({})
) -> Iterator[xr.Dataset | None]:
    """A group of the run of a reading, ``"trace"`` or ``"statistics"``; None where it has none.

    ``runs``: runs in memory by the names that `read_runs` was given; of others the file is opened, which was verified when
    it was read.
    """
    shown = f"{{}}/{reading.chain}" if reading.chain else "{}"
    run = next((run for name, run in runs.items() if visible_name(shown.format(name)) == reading.name), None)
    found = None
    with ExitStack() as stack:
        if (
            run is None
            and group == "statistics"
            and reading.path
            and schema.is_live_store(Path(reading.path))
        ):
            # Its steps are in its rows, and not in its newest state.
            run = schema.open_run(reading.path)
            stack.callback(run.close)
        if run is not None:
            found = schema.chain_dataset(run, group, reading.chain)
        elif reading.path:
            with suppress(AbsentError):  # a run of some groups alone
                opened = schema.open_group(reading.path, group, reading.chain)
                found = stack.enter_context(opened)
        yield found


def matrices_of(reading: Reading, runs: Mapping[str, xr.DataTree]) -> MixingMatrices | None:
    """Mixing matrices of a run, and their products over its halves and all of it; None where it has or stores none."""
    with group_of(reading, "trace", runs) as trace:
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
            {pair: composite(values[pair[0] : pair[1] + 1]).mean(axis=0) for pair in ranges},
        )


def with_metrics(
    run: xr.DataTree, metrics: Mapping[str, xr.Dataset], *, complete: bool = True
) -> xr.DataTree:
    """A run with new metrics, by chain, in place of its own; what else it contains stays as it is."""
    nodes = {node.path: node.to_dataset(inherit=False) for node in run.subtree}
    for chain, fresh in metrics.items():
        stored = schema.chain_dataset(run, "metrics", chain)
        nodes[f"/{group_path('metrics', chain)}"] = renewed(fresh, stored, complete=complete)
    return xr.DataTree.from_dict(nodes)


def renewed(fresh: xr.Dataset, stored: xr.Dataset | None, *, complete: bool) -> xr.Dataset:
    """The stored metrics of a trace, updated with those that were computed again.

    ``complete``: whether `fresh` is all that the run can feed; complete stored metrics stay complete.
    """
    if stored is None:
        return fresh.assign_attrs({schema.COMPLETE: complete})
    if LIVE in stored.attrs:
        merged = with_live(fresh, stored)
        return merged.assign_attrs({**_attributes(fresh, stored, merged), schema.COMPLETE: complete})
    # Streams may differ: an analysis of shares has no mean, see `_with_same_streams`.
    for dim in sorted(map(str, set(fresh.sizes) & set(stored.sizes) - {"stream"})):
        if not fresh[dim].variable.equals(stored[dim].variable):
            raise InputError(
                f"the stored metrics are of another trace: their {dim} differs from that of the run's trace; "
                "expected the same; save the new metrics to another file with --out RUN"
            )
    # A stored value of a metric that this trace cannot feed would contradict the reason in `not_computed`.
    not_computed = set(fresh.attrs.get("not_computed", {}))
    fresh, stored = _with_same_streams(fresh, stored)
    # A metric leaves together with its null and its standard error.
    removed = {
        v for v in stored.data_vars if str(v).removesuffix("_stderr").removesuffix("_null") in not_computed
    }
    merged = stored.drop_vars(removed).assign(dict(fresh.data_vars))
    complete = complete or bool(stored.attrs.get(schema.COMPLETE))
    return merged.assign_attrs({**_attributes(fresh, stored, merged), schema.COMPLETE: complete})


def _with_same_streams(fresh: xr.Dataset, stored: xr.Dataset) -> list[xr.Dataset]:
    """Both with every stream label: an analysis of shares alone has no mean over streams."""
    parts = (stored, fresh)
    found = [label for part in parts if "stream" in part.dims for label in part["stream"].values.tolist()]
    streams = list(dict.fromkeys(found))
    # Labels that one of them lacks become NaN, undefined.
    return [part.reindex(stream=streams) if "stream" in part.dims else part for part in (fresh, stored)]


def _attributes(fresh: xr.Dataset, stored: xr.Dataset, merged: xr.Dataset) -> dict[str, Any]:
    # The new analysis wins, except where both list metrics: those lists are merged below.
    attrs = {**stored.attrs, **fresh.attrs}
    for name in ("not_computed", "notes"):
        # A reason or a note of a metric that was computed again is replaced, or no longer true.
        old = {key: text for key, text in stored.attrs.get(name, {}).items() if key not in fresh}
        attrs[name] = {**old, **fresh.attrs.get(name, {})}
    attrs["not_computed"] = {name: why for name, why in attrs["not_computed"].items() if name not in merged}
    return attrs
