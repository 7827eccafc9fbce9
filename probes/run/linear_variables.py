"""What is stored of connections that are no streams? Factors of plain ones, weights over depth, and the coordinates of both.

Shapes: C connections, K sequences, T tokens, D features, S ≤ C + 1 sources (the embedding, then each sublayer's output).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.probes.structure.chain import Connection

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


def factor_variables(
    residual: Sequence[torch.Tensor | None], branch: Sequence[torch.Tensor | None]
) -> Variables:
    """The factors a and b of plain connections X' = a X + b F.

    ``residual, branch``: one item a connection: (K, T), (K, T, D), or None for a factor of 1.
    Returns: ``residual_scale``, ``residual_gate``, ``branch_scale`` and ``branch_gate`` as (dims, array), those that
    are not 1 everywhere.
    Raises InputError: For items of another number of axes or of different sizes.
    """
    found: Variables = {}
    for name, factors in (("residual", residual), ("branch", branch)):
        for ending, axes in (("scale", 2), ("gate", 3)):
            array = _stacked_factors([f if f is not None and f.ndim == axes else None for f in factors])
            if array is not None:
                found[f"{name}_{ending}"] = (schema.TRACE[f"{name}_{ending}"].dims, array)
        odd = next((f.ndim for f in factors if f is not None and f.ndim not in (2, 3)), None)
        if odd is not None:
            raise InputError(
                f"a factor of the {name} has {odd} axes; expected (sequence, token) or (sequence, token, feature)"
            )
    return found


def _stacked_factors(factors: Sequence[torch.Tensor | None]) -> np.ndarray | None:
    """The factors of all connections, 1 where there is none; None where none has one."""
    factors = [None if factor is None or bool((factor == 1).all()) else factor for factor in factors]
    known = [factor for factor in factors if factor is not None]
    if not known:
        return None
    if len({tuple(factor.shape) for factor in known}) > 1:
        shapes = sorted({tuple(factor.shape) for factor in known})
        raise InputError(f"factors of one chain have the shapes {shapes}; expected one shape")
    ones = torch.ones_like(known[0])
    return torch.stack([ones if factor is None else factor for factor in factors]).numpy()


def depth_variables(
    read: Sequence[torch.Tensor] | None = None, carry: Sequence[torch.Tensor] | None = None
) -> Variables:
    """How much each branch reads, and each next state keeps, of the sources: the embedding and every branch's output.

    ``read``: one item a connection, (K, T, V, S) with any S ≤ C + 1: sources that are left out at the end have the weight 0.
    ``carry``: the same without V.
    Returns: ``depth_read`` or, for several inputs V, ``depth_reads``; and ``depth_carry``, as (dims, array).
    Raises InputError: Where a connection has a weight on its own output or a later one.
    """
    found: Variables = {}
    several = read is not None and any(row.shape[-2] > 1 for row in read)
    if read is not None and not several:
        read = [row.squeeze(-2) for row in read]
    for name, rows in (("depth_reads" if several else "depth_read", read), ("depth_carry", carry)):
        if not rows:
            continue
        padded = np.zeros((len(rows), *rows[0].shape[:-1], len(rows) + 1), dtype=np.float32)
        for number, row in enumerate(rows):
            # Connection k comes after the embedding and k outputs.
            if row.shape[-1] > number + 1 and bool(row[..., number + 1 :].nan_to_num().any()):
                raise InputError(
                    f"{name} of connection {number} has a weight on source {number + 1} or later; expected only "
                    f"the {number + 1} sources before it"
                )
            kept = min(row.shape[-1], number + 1)
            padded[number, ..., :kept] = row[..., :kept].numpy()
            padded[number][np.isnan(padded[number, ..., 0])] = np.nan
        found[name] = (schema.TRACE[name].dims, padded)
    return found


def linear_coords(connections: Sequence[Connection], *, over_depth: bool = False) -> dict[str, Any]:
    """Coordinates of the connection axis that say more than where a connection is; those that are trivial are left out.

    ``over_depth``: whether the chain has variables of `depth_variables`, whose sources are then numbered.
    """
    coords: dict[str, Any] = {"source": np.arange(len(connections) + 1)} if over_depth else {}
    after = ["norm" if each.style == "normed" else "" for each in connections]
    if any(after):
        coords["after_sum"] = ("connection", np.array(after, dtype=object))
    return coords
