"""What happens to the stored metrics of a run when some are computed again? New ones replace them, the others stay."""

from __future__ import annotations

from typing import Any

import xarray as xr

from depthscope.app.readings.readings import COMPLETE, LIVE, with_live
from depthscope.diagnostics.errors import InputError


def renewed(fresh: xr.Dataset, stored: xr.Dataset | None, *, complete: bool) -> xr.Dataset:
    """The stored metrics of a trace, updated with those that were computed again.

    A standard error that the new analysis does not estimate, such as one of the jackknife, stays: it is of the same
    trace.

    ``complete``: whether `fresh` is all that the run can feed; complete stored metrics stay complete.
    """
    if stored is None:
        return fresh.assign_attrs({COMPLETE: complete})
    if LIVE in stored.attrs:
        merged = with_live(fresh, stored)
        return merged.assign_attrs({**_attributes(fresh, stored, merged), COMPLETE: complete})
    _require_same_trace(fresh, stored)
    # A stored value of a metric that this trace cannot feed would contradict the reason in `not_computed`.
    not_computed = set(fresh.attrs.get("not_computed", {}))
    fresh, stored = _with_same_streams(fresh, stored)
    # A metric leaves together with its null and its standard error.
    removed = {
        v for v in stored.data_vars if str(v).removesuffix("_stderr").removesuffix("_null") in not_computed
    }
    merged = stored.drop_vars(removed).assign(dict(fresh.data_vars))
    merged = merged.assign(_stored_errors(fresh, stored))
    complete = complete or bool(stored.attrs.get(COMPLETE))
    return merged.assign_attrs({**_attributes(fresh, stored, merged), COMPLETE: complete})


def _require_same_trace(fresh: xr.Dataset, stored: xr.Dataset) -> None:
    # Streams may differ: an analysis of the mean stream has one label, see `_with_same_streams`.
    shared = set(fresh.sizes) & set(stored.sizes) - {"stream"}
    for dim in sorted(map(str, shared)):
        if not fresh[dim].variable.equals(stored[dim].variable):
            raise InputError(
                f"the stored metrics are of another trace: their {dim} differs from that of the run's trace; "
                "expected the same; save the new metrics to another file with --out RUN"
            )


def _with_same_streams(fresh: xr.Dataset, stored: xr.Dataset) -> list[xr.Dataset]:
    """Both with every stream label: an analysis of the mean stream only has no other label."""
    parts = (stored, fresh)
    found = [label for part in parts if "stream" in part.dims for label in part["stream"].values.tolist()]
    streams = list(dict.fromkeys(found))
    # Labels that one of them lacks become NaN, undefined.
    return [part.reindex(stream=streams) if "stream" in part.dims else part for part in (fresh, stored)]


def _stored_errors(fresh: xr.Dataset, stored: xr.Dataset) -> dict[str, xr.DataArray]:
    """Standard errors of both, where the stored one is defined and the new one is not."""
    both = [str(name) for name in fresh.data_vars if str(name).endswith("_stderr") and name in stored]
    filled = {name: fresh[name].fillna(stored[name]).assign_attrs(stored[name].attrs) for name in both}
    # An error that was not filled keeps the attributes of the new estimate.
    return {name: error for name, error in filled.items() if not error.equals(fresh[name])}


def _attributes(fresh: xr.Dataset, stored: xr.Dataset, merged: xr.Dataset) -> dict[str, Any]:
    # The new analysis wins, except where both list metrics: those lists are merged below.
    attrs = {**stored.attrs, **fresh.attrs}
    for name in ("not_computed", "notes"):
        # A reason or a note of a metric that was computed again is replaced, or no longer true.
        old = {key: text for key, text in stored.attrs.get(name, {}).items() if key not in fresh}
        attrs[name] = {**old, **fresh.attrs.get(name, {})}
    attrs["not_computed"] = {name: why for name, why in attrs["not_computed"].items() if name not in merged}
    if "on_request" in attrs:
        # Of one that this run cannot feed the reason is known now.
        known = {*merged, *attrs["not_computed"]}
        attrs["on_request"] = [name for name in attrs["on_request"] if name not in known]
    return attrs
