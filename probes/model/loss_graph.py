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
    tokens of the batch, whatever that of the last token of a sequence is; ``repeats_input``, whether they are those tokens;
    ``targets_per_sequence``, 1 where a sequence has one class; ``constant``, see `_constant_loss`.
    """
    start = None if loss is None else loss.grad_fn
    for node in _nodes(start):
        if not node.name().startswith(("NllLoss", "NLLLoss")):
            continue
        before, number = node.next_functions[0]
        shape = before._input_metadata[number].shape if before is not None else ()
        if not len(shape):
            return {}
        classes = int(shape[1 if len(shape) > 1 else 0])
        is_mean = node is start and getattr(node, "_saved_reduction", None) == 1
        return {
            "classes": classes,
            "guessing": math.log(max(classes, 1)),
            "softmax_twice": _is_softmax_twice(node),
            "predicts_next": _are_tokens(_target_of(node), batch, ahead=1),
            "repeats_input": _are_tokens(_target_of(node), batch, ahead=0),
            **_targets_per_sequence(_target_of(node), batch),
            **_constant_loss(_target_of(node) if is_mean else None),
        }
    return {}


def _target_of(node: Any) -> torch.Tensor | None:
    """The targets of a cross entropy; None where its backward has run already, which frees them."""
    try:
        found = getattr(node, "_saved_target", None)
    except RuntimeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


# Targets for each class that comes: of fewer the frequencies, and with them their entropy, are not known well. Heuristic.
ENOUGH = 4
# Of fewer targets the loss itself is not: that of one varies by about 1 nat, and the mean of these by 0.1.
FEWEST_TARGETS = 100


def _constant_loss(target: torch.Tensor | None) -> dict[str, float]:
    """``constant``: the loss of always answering with how often each class comes, its entropy in nats (Miller and Madow).

    Where that is not known well it is that of equal probabilities for the classes that come, which is no less. Empty of one
    class, and of too few targets.
    """
    if target is None:
        return {}
    counts = torch.unique(target[target != IGNORED], return_counts=True)[1].double()
    total = float(counts.sum())
    if len(counts) < 2 or total < FEWEST_TARGETS:
        return {}
    if total < ENOUGH * len(counts):
        return {"constant": math.log(len(counts))}
    share = counts / total
    return {"constant": float(-(share * share.log()).sum()) + (len(counts) - 1) / (2 * total)}


def _targets_per_sequence(target: torch.Tensor | None, batch: Any) -> dict[str, int]:
    sizes = [len(tensor) for tensor in tensors_in(batch) if tensor.ndim > 1]
    if target is None or not sizes or target.numel() % sizes[0]:
        return {}
    return {"targets_per_sequence": target.numel() // sizes[0]}


IGNORED = -100  # torch's own label of what does not count


def _are_tokens(target: torch.Tensor | None, batch: Any, *, ahead: int) -> bool:
    """Whether the targets are some ids of the batch, or the next ones; that of the last token may be in no input."""
    if target is None:
        return False
    for ids in tensors_in(batch):
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
            continue
        for columns in {ids.shape[1] - ahead, ids.shape[1]}:
            if target.numel() != len(ids) * columns:
                continue
            inner = target.reshape(len(ids), columns)[:, : ids.shape[1] - ahead]
            counted = inner != IGNORED
            if bool(counted.any()) and torch.equal(
                inner[counted].to(ids), ids[:, ahead:][counted.to(ids.device)]
            ):
                return True
    return False


def mean_task(tasks: Sequence[dict[str, Any]], loss: float | None) -> dict[str, Any]:
    """The task of several batches with their mean loss; empty where it is not the same in all of them."""
    if (
        not tasks
        or not tasks[0]
        or any({**task, "constant": 0} != {**tasks[0], "constant": 0} for task in tasks)
        or loss is None
        or not math.isfinite(loss)
    ):
        return {}
    constants = [task["constant"] for task in tasks if "constant" in task]
    known = {"constant": sum(constants) / len(constants)} if len(constants) == len(tasks) else {}
    return {**{name: value for name, value in tasks[0].items() if name != "constant"}, **known, "loss": loss}


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
