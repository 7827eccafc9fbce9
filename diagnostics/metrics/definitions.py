"""Is a stored number what its metric is today? By its stored symbol: an earlier version may have defined it otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.metrics.catalogue import CATALOGUE

REASON = "stored by an earlier version, which defined it otherwise: analyze the run again where it has states"


def is_still_defined_so(variable: str, attrs: Mapping[str, Any]) -> bool:
    """Whether a variable of stored metrics has the definition of the catalogue; true for what is no metric."""
    metric = CATALOGUE.get(variable.removesuffix("_stderr").removesuffix("_null"))
    return metric is None or attrs.get("symbol", metric.symbol) == metric.symbol


def with_definitions_of_today(stored: xr.Dataset) -> xr.Dataset:
    """Stored metrics without those that are something else today; the reason is under ``not_computed``."""
    other = [
        str(name) for name, each in stored.data_vars.items() if not is_still_defined_so(str(name), each.attrs)
    ]
    if not other:
        return stored
    reasons = {name: REASON for name in other if name in CATALOGUE}
    left_out = {**stored.attrs.get("not_computed", {}), **reasons}
    attrs = {**stored.attrs, "not_computed": left_out, "complete": False}
    return stored.drop_vars(other).assign_attrs(attrs)
