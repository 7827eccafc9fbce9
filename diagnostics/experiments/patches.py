"""How is the result of a patch shown as a table? One row a cell, with plain values, and the largest first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.experiments.variables import CELLS, ESTIMATES


def patch_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """One row for each cell that was patched; None for what is not known, and for a token or stream that is all at once.

    ``result``: of `depthscope.interventions.patch`.
    Returns: The largest change of the measure first.
    """
    change = result["change"].transpose(*CELLS)
    rows = []
    for at in zip(*np.nonzero(np.isfinite(change.values)), strict=True):
        cell = dict(zip(CELLS, map(int, at), strict=True))
        row: dict[str, Any] = {
            dim: result[dim].values[cell[dim]].item() if dim != "site" else str(result[dim].values[at[0]])
            for dim in CELLS
        }
        row["block"] = int(result["layer"].values[cell["depth"]])
        row |= {name: None for name in ("token", "stream", "block") if row[name] < 0}
        row["connection"] = (
            int(result["connection"].values[cell["depth"]]) if row["site"] != "residual" else None
        )
        for name in ("effect", "change"):
            for ending in ESTIMATES:
                found = float(result[name + ending].values[at])
                row[name + ending] = found if math.isfinite(found) else None
        if "token_text" in result and row["token"] is not None:
            texts = result["token_text"].values[:, cell["token"]]
            row["token_text"] = " / ".join(dict.fromkeys(str(text) for text in texts if str(text)))
        rows.append(row)
    return sorted(rows, key=lambda row: -abs(row["change"]))
