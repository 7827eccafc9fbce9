"""What becomes of the metrics that a run holds when some are measured again? New ones replace, the others stay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import xarray as xr

from depthscope.app.readings.readings import COMPLETE


def renewed(
    fresh: xr.Dataset, stored: xr.Dataset | None, *, complete: bool, outdated: Collection[str] = ()
) -> xr.Dataset:
    """The stored metrics of a trace with those that were measured again.

    A standard error that the new analysis does not estimate, such as one of the jackknife, stays: it is of the same
    trace.

    Parameters
    ----------
    fresh : Dataset
        What `diagnostics.analyze` gave now.
    stored : Dataset or None
        What the run holds in /metrics.
    complete : bool
        Whether `fresh` is all that the run can feed; what was complete stays so.
    outdated : collection of str
        Metrics whose stored values no longer hold.

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        Where the stored metrics are of another trace.
    """
    if stored is None:
        return fresh.assign_attrs({COMPLETE: complete})
    _require_same_trace(fresh, stored)
    stale = set(outdated) - set(map(str, fresh.data_vars)) - _not_computed(fresh)
    fresh, stored = _with_same_streams(fresh, stored)
    gone = {name for name in stored.data_vars if _metric_of(name) in stale | _not_computed(fresh)}
    merged = stored.drop_vars(gone).assign(dict(fresh.data_vars) | _errors(fresh, stored))
    whole = complete or bool(stored.attrs.get(COMPLETE) and not stale)
    return merged.assign_attrs(_attributes(fresh, stored, merged, stale) | {COMPLETE: whole})


def _metric_of(variable: Any) -> str:
    return str(variable).removesuffix("_stderr").removesuffix("_null")


def _not_computed(analysis: xr.Dataset) -> set[str]:
    return set(analysis.attrs.get("not_computed", {}))


def _require_same_trace(fresh: xr.Dataset, stored: xr.Dataset) -> None:
    shared = set(fresh.sizes) & set(stored.sizes) - {"stream"}
    for dim in sorted(map(str, shared)):
        if not fresh[dim].variable.equals(stored[dim].variable):
            raise ValueError(
                f"the run holds metrics of another trace: their {dim} is not that of its trace; expected the same; "
                "save the new ones beside them with --out RUN"
            )


def _with_same_streams(fresh: xr.Dataset, stored: xr.Dataset) -> list[xr.Dataset]:
    """Both with every stream label: metrics of the mean stream alone know no other."""
    parts = (stored, fresh)
    found = [label for part in parts if "stream" in part.dims for label in part["stream"].values.tolist()]
    streams = list(dict.fromkeys(found))
    return [part.reindex(stream=streams) if "stream" in part.dims else part for part in (fresh, stored)]


def _errors(fresh: xr.Dataset, stored: xr.Dataset) -> dict[str, xr.DataArray]:
    """Standard errors that both hold, where the stored one is defined and the new one is not."""
    both = [
        str(name) for name in fresh.data_vars if str(name).endswith("_stderr") and name in stored.data_vars
    ]
    filled = {name: fresh[name].fillna(stored[name]).assign_attrs(stored[name].attrs) for name in both}
    return {name: error for name, error in filled.items() if not error.equals(fresh[name])}


def _attributes(
    fresh: xr.Dataset, stored: xr.Dataset, merged: xr.Dataset, stale: Collection[str]
) -> dict[str, Any]:
    old = {
        name: {key: text for key, text in stored.attrs.get(name, {}).items() if key not in {*fresh, *stale}}
        for name in ("not_computed", "notes")
    }
    told = {name: kept | dict(fresh.attrs.get(name, {})) for name, kept in old.items()}
    told["not_computed"] = {name: why for name, why in told["not_computed"].items() if name not in merged}
    attrs = {**stored.attrs, **fresh.attrs, **told}
    if "on_request" in attrs:
        attrs["on_request"] = [name for name in attrs["on_request"] if name not in merged]
    return attrs
