"""Did two forwards give the same? Bit for bit, or up to the rounding of sums in another order."""

from __future__ import annotations

from typing import Any

import torch

from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.model.tensors import tensors_in

# Of two forwards of one batch: sums of a device in another order. A heuristic of ours.
REPEATED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def repeats(one: Any, other: Any) -> bool:
    """Whether two outputs of the same batch are equal up to the rounding of sums in another order."""
    if same_values(one, other):
        return True
    return all(
        a.dtype in REPEATED
        and a.shape == b.shape
        and relative_error(a.double() - b.double(), a.double()) <= REPEATED[a.dtype]
        for a, b in zip(tensors_in(one), tensors_in(other), strict=True)
        if not same_values(a, b)
    )


def same_values(one: Any, other: Any) -> bool:
    """Whether two outputs have the same numbers, bit for bit; undefined ones count as equal."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    return all(a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)
