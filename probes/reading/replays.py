"""What does a recorded operation give on other operands? One operation, and all steps between some values and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from depthscope.probes.reading.graph import Graph, TracedValue, filled
from depthscope.probes.reading.operations import SUMS, VIEWS, addends


def run(
    graph: Graph,
    value: TracedValue,
    given: Mapping[int, torch.Tensor],
    *,
    real: bool = False,
    empty: float = 0,
) -> torch.Tensor:
    """An operation on other operands; what is only added counts as zero, or as it was.

    Parameters
    ----------
    graph : Graph
        The forward.
    value : TracedValue
        What the operation made.
    given : mapping of int to Tensor
        Operands by their numbers, in the place of their own values.
    real : bool
        Whether what is added besides keeps its value.
    empty : float
        What memory holds in which nothing was written.

    Returns
    -------
    Tensor
    """
    added = {v.number for v in addends(value)}
    if value.name == "copy" and isinstance(value.args[0], TracedValue):
        added.add(value.args[0].number)

    def operand(of: TracedValue) -> torch.Tensor:
        if of.number in given:
            return given[of.number]
        if of.number in added and not real:
            return torch.zeros(of.shape, dtype=of.dtype, device=next(iter(given.values())).device)
        return graph.tensor(of)

    special = _SPECIAL.get(value.name)
    if special is not None:
        return special(graph, value, operand, empty)
    args, kwargs = list(filled(value.args, operand)), filled(value.kwargs, operand)
    if not real:
        _leave_out_constants(value, args)
    if value.func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
        args[0] = args[0].clone()
    result = value.func(*args, **kwargs)
    return result[value.item] if isinstance(result, (tuple, list)) else result


def _leave_out_constants(value: TracedValue, args: list[Any]) -> None:
    """Numbers that are added count as zero."""
    for at in SUMS.get(value.name, ()):
        if at < len(args) and isinstance(args[at], (int, float)):
            args[at] = 0


def _patched(
    graph: Graph, value: TracedValue, operand: Callable[[TracedValue], Any], empty: float
) -> torch.Tensor:
    old, new, own, where = value.args
    a, b = operand(old), operand(new)
    ends = [
        o + sum((s - 1) * t for s, t in zip(shape, stride, strict=True)) for shape, stride, o in (own, where)
    ]
    flat = torch.full((1 + max(ends),), empty, dtype=a.dtype, device=a.device)
    flat.as_strided(*own).copy_(a)
    flat.as_strided(*where).copy_(b)
    return flat.as_strided(*own).clone()


def _dropout(
    graph: Graph, value: TracedValue, operand: Callable[[TracedValue], Any], empty: float
) -> torch.Tensor:
    mask = next(
        v for v in graph.values[value.number : value.number + 3] if v.item == 1 and v.args is value.args
    )
    return operand(value.args[0]) * graph.tensor(mask) / (1 - value.args[1])


_SPECIAL: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(VIEWS, lambda graph, value, operand, empty: operand(value.args[0]).reshape(value.shape)),
    "patch": _patched,
    "copy": lambda graph, value, operand, empty: operand(value.args[1]).expand(value.shape).clone(),
    "native_dropout": _dropout,
    "contiguous": lambda graph, value, operand, empty: operand(value.args[0]),
    "lift_fresh": lambda graph, value, operand, empty: operand(value.args[0]),
}
