"""How much of the gradient of H_res reached its logits, and what were these? Of every connection of a followed forward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from depthscope.probes.connections.computation import Search
from depthscope.probes.connections.logits import NOT_SEEN, find_logits, is_same_matrix


@dataclass(frozen=True)
class MixingLogits:
    """The logits of one connection, or why they are not known.

    ``why``: empty where they are known.
    ``logits``: (K, T, n, n) of the sampled sequences of the followed batch, rows are destinations.
    ``logit_gradient, mixing_gradient``: ‖∂L/∂H̃‖_F and ‖∂L/∂H_res‖_F over all tokens of that batch; NaN without a
    loss, 0 where none arrives.
    """

    why: str = ""
    logits: torch.Tensor | None = None
    logit_gradient: float = math.nan
    mixing_gradient: float = math.nan


def mixing_logits(search: Search) -> list[MixingLogits]:
    """Find the logits of every connection, and the gradients of the loss there and at H_res."""
    found = [_of_connection(search, number) for number in range(len(search.applied))]
    loss = search.forward.loss
    tensors = [tensor for _, pair in found for tensor in pair]
    if loss is None or not loss.requires_grad or not tensors:
        return [logits for logits, _ in found]
    # Tensors inside of the graph alone: no parameter's gradient is written.
    gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    norms = iter([0.0 if each is None else float(each.double().norm()) for each in gradients])
    return [
        replace(logits, logit_gradient=next(norms), mixing_gradient=next(norms)) if pair else logits
        for logits, pair in found
    ]


def _of_connection(search: Search, number: int) -> tuple[MixingLogits, tuple[torch.Tensor, ...]]:
    """The logits of a connection, and the tensors that are its logits and its matrix."""
    forward, wanted = search.forward, search.applied[number].mix
    found = search.found[number].get("H_res", [])
    if not found:
        return MixingLogits(NOT_SEEN), ()
    behind = search.behind(found[-1:])
    # The matrix may be a part of what reads and mixes, and was computed before: whatever leads to that. A copy for a log is
    # not what is applied.
    known = {value.number for value in found}
    at: dict[str, Any] = {"batch": forward.batch_size, "tokens": forward.tokens, "rows": forward.rows}
    mix = [
        value
        for value in search.squares(number, (0, found[-1].number + 1))
        if value.number in behind
        and forward.is_used(value)
        and (value.number in known or is_same_matrix(value.tensor.detach(), wanted, **at))
    ]
    place = find_logits(
        forward.graph,
        [each for each in search.squares(number, (0, found[-1].number)) if each.number in behind],
        mix,
        wanted,
        **at,
        rounding=torch.finfo(forward.precision).eps,
    )
    if isinstance(place, str):
        return MixingLogits(place), ()
    logits, matrix = place.logits.tensor, place.matrix.tensor
    every = place.turned(logits, forward.batch_size, forward.tokens, wanted.shape[-1])
    return MixingLogits(logits=every[forward.rows].to("cpu", torch.float32)), (logits, matrix)
