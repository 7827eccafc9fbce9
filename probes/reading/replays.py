"""What does a recorded operation give on other operands? One operation alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from depthscope.probes.reading.graph import Graph, TracedValue, filled
from depthscope.probes.reading.operations import SUMS

Operand = Callable[[TracedValue], Any]


def run(graph: Graph, value: TracedValue, operand: Operand, *, constants: bool, empty: float = 0) -> torch.Tensor:
    """An operation on other operands; with ``constants`` the numbers that it adds are added, else they count as zero."""
    special = _SPECIAL.get(value.name)
    if special is not None:
        return special(graph, value, operand, empty)
    args, kwargs = list(filled(value.args, operand)), filled(value.kwargs, operand)
    if not constants:
        for at in SUMS.get(value.name, ()):
            if at < len(args) and isinstance(args[at], (int, float)):
                args[at] = 0
    if value.func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
        args[0] = args[0].clone()
    result = value.func(*args, **kwargs)
    return result[value.item] if isinstance(result, (tuple, list)) else result


def _patched(graph: Graph, value: TracedValue, operand: Operand, empty: float) -> torch.Tensor:
    old, new, own, where = value.args
    a, b = operand(old), operand(new)
    ends = [
        o + sum((s - 1) * t for s, t in zip(shape, stride, strict=True)) for shape, stride, o in (own, where)
    ]
    flat = torch.full((1 + max(ends),), empty, dtype=a.dtype, device=a.device)
    flat.as_strided(*own).copy_(a)
    flat.as_strided(*where).copy_(b)
    return flat.as_strided(*own).clone()


def _dropout(graph: Graph, value: TracedValue, operand: Operand, empty: float) -> torch.Tensor:
    later = graph.values[value.number : value.number + 3]
    mask = next(v for v in later if v.item == 1 and v.args is value.args)
    return operand(value.args[0]) * operand(mask) / (1 - value.args[1])


_SPECIAL: dict[str, Callable[..., torch.Tensor]] = {"patch": _patched, "native_dropout": _dropout}
