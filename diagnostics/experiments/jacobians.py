"""What do saved Jacobians say? One row each, the whole chain's last."""

from __future__ import annotations

import math
from typing import Any

import xarray as xr


def jacobian_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """One row a Jacobian with plain values, the whole chain's last: None for what is not known.

    Parameters
    ----------
    result : Dataset
        Of `depthscope.probes.jacobian.jacobians_by_depth`.

    Returns
    -------
    list of dict
    """
    spans = [(depth - 1, depth) for depth in result["depth"].values.tolist()]
    last = spans[-1][1]
    rows = []
    for position, (start, stop) in enumerate([*spans, (0, last)]):
        whole = position == len(spans)

        def plain(name: str, whole: bool = whole, position: int = position) -> Any:
            values = result[f"whole_{name}"] if whole else result[name].isel(depth=position)
            found = values.values.tolist()
            return [_plain(each) for each in found] if isinstance(found, list) else _plain(found)

        rows.append(
            {
                "start": start,
                "stop": stop,
                "singular_values": plain("singular_value"),
                "errors": plain("singular_value_error"),
                **{
                    name: plain(name)
                    for name in (
                        "mean_square",
                        "mean_square_error",
                        "square_variance",
                        "square_variance_error",
                    )
                },
            }
        )
    return rows


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
