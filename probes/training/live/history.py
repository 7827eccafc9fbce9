"""What do the rows of a training make together? Datasets by step, as an analysis of several steps has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from depthscope.probes.training.live.row import LiveRow

SAMPLED_TOKENS = "sampled_tokens"
"""Attribute of a history: how many tokens of each step its ranks and similarities are of."""


def histories(rows: Sequence[LiveRow], attrs: Mapping[str, Mapping[str, Any]]) -> dict[str, xr.Dataset]:
    """The metrics of all measured steps, by chain.

    Returns: Dims of an analysis, ``step`` first; nulls have no step. NaN in steps without a value.
    """
    found: dict[str, dict[str, Any]] = {}
    coords: dict[str, dict[str, Any]] = {}
    declared = {path: value for row in rows for path, value in row.numbers.items()}
    for path, (dims, values, of_variable) in declared.items():
        chain, name = _chain_and_name(path)
        missing = np.full(values.shape, np.nan)
        stacked = np.stack([row.numbers[path][1] if path in row.numbers else missing for row in rows])
        found.setdefault(chain, {})[name] = (("step", *dims), stacked, dict(of_variable))
    for path, value in {path: value for row in rows for path, value in row.coords.items()}.items():
        chain, name = _chain_and_name(path)
        if name.endswith("_null"):
            found.setdefault(chain, {})[name] = value
        else:
            coords.setdefault(chain, {})[name] = value
    steps = np.array([row.step for row in rows])
    reasons = rows[-1].not_computed if rows else {}
    return {
        chain: xr.Dataset(
            variables,
            {**coords.get(chain, {}), "step": steps},
            attrs={**attrs.get(chain, {}), "not_computed": dict(reasons.get(chain, {}))},
        )
        for chain, variables in found.items()
    }


def _chain_and_name(path: str) -> tuple[str, str]:
    """Of ``metrics/NAME`` or ``metrics/CHAIN/NAME``."""
    group, _, name = path.rpartition("/")
    return group.partition("/")[2], name
