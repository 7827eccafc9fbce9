"""How do coefficients of connections move over the steps, and their logits, biases and gates? One row a step, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthscope.diagnostics import schema
from depthscope.probes.session.logit_statistics import LOGIT_SUMS
from depthscope.probes.statistics.token_sums import Sums, stacked

PARAMETER = "connection_parameter"


def mixing_statistics(
    sums: Sequence[Sums], num_connections: int, cells: Mapping[int, Sequence[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables and coordinates of ``/statistics`` of the connections with streams.

    ``cells``: for each connection the parameter that each of its stored values belongs to, see `ConnectionParameters`.
    """
    keys, variables = list(range(num_connections)), {}
    for name in (*LOGIT_SUMS, "logit_range_max", *schema.SUMS_OF_COEFFICIENTS):
        if any(of.array(name, keys) is not None for of in sums):
            values = stacked(sums, name, keys)
            if name.startswith("logit_range"):  # over the last axis of the matrix, then over the one before
                values = values[..., 0]
            variables[name] = (schema.STATISTICS[name].dims, values)
    of_parameters, coords = _parameters(sums, cells)
    return variables | of_parameters, coords


def _parameters(
    sums: Sequence[Sums], cells: Mapping[int, Sequence[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The biases and gates of all connections."""
    numbers = [number for number in cells if any(of.array(PARAMETER, [number]) is not None for of in sums)]
    if not numbers:
        return {}, {}
    values = np.concatenate([stacked(sums, PARAMETER, [number])[:, 0] for number in numbers], axis=1)
    owner = np.array([name for number in numbers for name in cells[number]], dtype=object)
    return {PARAMETER: (schema.STATISTICS[PARAMETER].dims, values)}, {"cell_parameter": ("cell", owner)}
