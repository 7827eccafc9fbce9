"""How did the mixing matrices change while the network was trained? Their means over tokens at every measured step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema


def mixing_history(statistics: xr.Dataset) -> xr.DataArray | None:
    """The mean over tokens of every connection's H_res at each step.

    Returns: Dims ``step``, ``connection``, ``stream_out``, ``stream_in``; NaN without a token. None where fewer than
    two steps were recorded, or no connection was.
    """
    if "h_res_sum" not in statistics or statistics.sizes.get("step", 0) < 2:
        return None
    count = statistics["token_count"]
    sums = statistics["h_res_sum"].transpose("step", "connection", "stream_out", "stream_in")
    return (sums / count.where(count > 0)).astype(np.float64)


def read_mixing_history(path: Path, chain: str = "", *, max_bytes: int | None = None) -> xr.DataArray | None:
    """The history of a run that was opened and verified before.

    ``chain``: its chain, empty where there is one.
    """
    if schema.is_live_store(path):
        run = schema.open_run(path, max_bytes=max_bytes)
        try:
            statistics = schema.chain_dataset(run, "statistics", chain)
            found = None if statistics is None else mixing_history(statistics)
            return None if found is None else found.load()
        finally:
            run.close()
    with schema.open_group(path, "statistics", chain, max_bytes=max_bytes) as statistics:
        found = mixing_history(statistics)
        return None if found is None else found.load()
