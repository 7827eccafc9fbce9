"""What do saved Jacobians show? One row each, that of the complete chain last."""

from __future__ import annotations

import math
from typing import Any

import xarray as xr

MOMENTS = ("mean_square", "mean_square_error", "square_variance", "square_variance_error")


def jacobian_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """One row a Jacobian with plain values, that of the complete chain last; None for what is not known."""
    depths = result["depth"].values.tolist()
    blocks = [_row(result.isel(depth=at), "", depth - 1, depth) for at, depth in enumerate(depths)]
    return [*blocks, _row(result, "whole_", 0, depths[-1])]


def _row(result: xr.Dataset, prefix: str, start: int, stop: int) -> dict[str, Any]:
    def plain(name: str) -> Any:
        values = result[prefix + name].values.tolist()
        return [_plain(each) for each in values] if isinstance(values, list) else _plain(values)

    return {
        "start": start,
        "stop": stop,
        "singular_values": plain("singular_value"),
        "errors": plain("singular_value_error"),
        **{name: plain(name) for name in MOMENTS},
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
