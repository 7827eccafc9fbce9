"""What does a loss measure? Its classes, and whether probabilities went into a softmax, read off the loss's own graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from depthscope.probes.model.tensors import tensors_in

MOST_NODES = 64  # from the scalar back: a mean over tokens, a few masks, the cross entropy
# What only rearranges numbers between a softmax and the next one.
SHAPES = (
    "View",
    "Unsafe",
    "Slice",
    "Reshape",
    "Transpose",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "ToCopy",
    "Clone",
    "Alias",
    "Index",
)


def read_task(loss: torch.Tensor | None, batch: Any) -> dict[str, Any]:
    """What the graph of a loss says of its task; empty where it is no cross entropy that torch computes.

    Returns: ``classes``, their number; ``guessing``, the loss of equal probabilities in nats; ``softmax_twice``, whether the
    numbers that the loss takes the softmax of come from one already; ``predicts_next``, whether its targets are the next
    tokens of the batch, and the last token of a sequence has none.
    """
    for node in _nodes(None if loss is None else loss.grad_fn):
        if not node.name().startswith(("NllLoss", "NLLLoss")):
            continue
        log_p = getattr(node, "_saved_self", None)
        if not isinstance(log_p, torch.Tensor) or log_p.ndim < 1:
            return {}
        classes = int(log_p.shape[1 if log_p.ndim > 1 else 0])
        target = getattr(node, "_saved_target", None)
        return {
            "classes": classes,
            "guessing": math.log(max(classes, 1)),
            "softmax_twice": _is_softmax_twice(node),
            "predicts_next": isinstance(target, torch.Tensor) and _are_next_tokens(target.flatten(), batch),
        }
    return {}


IGNORED = -100  # torch's own label of what does not count


def _are_next_tokens(target: torch.Tensor, batch: Any) -> bool:
    for ids in tensors_in(batch):
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
            continue
        following = torch.full_like(ids, IGNORED, dtype=target.dtype)
        following[:, :-1] = ids[:, 1:]
        for expected in (following[:, :-1].flatten(), following.flatten()):
            if expected.shape != target.shape:
                continue
            counted = target != IGNORED
            if bool(counted.any()) and torch.equal(target[counted].to(ids.device), expected[counted]):
                return True
    return False


def mean_task(tasks: Sequence[dict[str, Any]], loss: float | None) -> dict[str, Any]:
    """The task of several batches with their mean loss; empty where it is not the same in all of them."""
    if (
        not tasks
        or not tasks[0]
        or any(task != tasks[0] for task in tasks)
        or loss is None
        or not math.isfinite(loss)
    ):
        return {}
    return {**tasks[0], "loss": loss}


def _nodes(start: Any) -> Iterator[Any]:
    """The nodes behind a loss, the nearest first."""
    waiting, seen = [start] if start is not None else [], 0
    while waiting and seen < MOST_NODES:
        node = waiting.pop(0)
        seen += 1
        yield node
        waiting += [before for before, _ in node.next_functions if before is not None]


def _is_softmax_twice(loss: Any) -> bool:
    """Whether, behind the softmax of a cross entropy, nothing but changes of shape leads to another one."""
    node, passed = loss, False
    while node.next_functions and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
        name = node.name()
        if "LogSoftmax" in name:
            passed = True
        elif "Softmax" in name:
            return passed
        elif not name.startswith(SHAPES):
            return False
    return False
