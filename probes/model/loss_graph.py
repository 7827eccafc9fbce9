"""What is the loss of an output, and what does it measure? Its classes, and a softmax before its own, read off its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from depthscope.probes.model.errors import CaptureError
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
    ``targets_per_sequence``, 1 where a sequence has one class; and of a mean what `_compared` says.
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
            **(_compared_at_node(node, classes) if is_mean else {}),
        }
    return {}


def _target_of(node: Any) -> torch.Tensor | None:
    """The targets of a cross entropy."""
    return _saved(node, "_saved_target")


def _saved(node: Any, name: str) -> torch.Tensor | None:
    """What a node keeps for its backward; None where that has run already, which frees it."""
    try:
        found = getattr(node, name, None)
    except RuntimeError:
        return None
    return found.detach() if isinstance(found, torch.Tensor) else None


# Targets for each class that comes: of fewer the frequencies, and with them their entropy, are not known well. Heuristic.
ENOUGH = 4
# Of fewer targets it is not known which classes come.
FEWEST_TARGETS = 100
# Targets of which the entropy of the predictions is known well enough.
PREDICTIONS = 256
# The smallest probability that one less than it still shows in float32, and how near two ways to the same loss come.
LEAST, SAME_LOSS = 1e-7, 0.01
# Of one mean over batches: what is measured, and no fact of the task.
MEASURED = ("constant", "entropy", "uncertainty")


def _compared_at_node(node: Any, classes: int) -> dict[str, float]:
    """What the node of a mean cross entropy says of a constant answer, see `_compared`."""
    target, predicted = _target_of(node), _saved(node, "_saved_self")
    if target is None or predicted is None or predicted.ndim < 2:
        return {}
    rows, target = predicted.movedim(1, -1).reshape(-1, classes), target.flatten()
    counted = torch.nonzero(target != IGNORED)[:, 0]
    some = counted[:: max(1, len(counted) // PREDICTIONS)]
    return _compared(-rows[counted, target[counted]], target[counted], rows[some].float().exp(), classes)


def compared_by_gradient(gradient: torch.Tensor | None, classes: int, loss: float) -> dict[str, float]:
    """The same, read off the gradient of the logits: probabilities less one at the target, over the number of targets.

    Empty where that is not how the loss came about: it is computed again from the gradient.
    """
    if gradient is None or gradient.ndim < 2 or gradient.shape[-1] != classes:
        return {}
    rows = gradient.detach().reshape(-1, classes)
    rows = rows[rows.any(1)]
    target = rows.argmin(1)
    losses = -(1.0 + len(rows) * rows.gather(1, target[:, None])[:, 0].double()).clamp(min=LEAST).log()
    mean, most = (float(losses.mean()), float(losses.max())) if len(rows) else (math.nan, 0.0)
    # Of a target that was far from expected only a part of its loss is left in the rounding.
    least = 0.5 * loss if most > -0.8 * math.log(LEAST) else (1.0 - SAME_LOSS) * loss
    if not least <= mean <= (1.0 + SAME_LOSS) * loss:
        return {}
    some = slice(None, None, max(1, len(rows) // PREDICTIONS))
    chosen = functional.one_hot(target[some], classes)
    return _compared(losses, target, len(rows) * rows[some].float() + chosen, classes)


def _compared(
    losses: torch.Tensor, target: torch.Tensor, some: torch.Tensor, classes: int
) -> dict[str, float]:
    """What a cross entropy has to beat, and how sure the predictions are, in nats; empty of one class.

    ``losses``, ``target``: of each target; ``some``: the probabilities of some predictions.
    Returns: ``constant``: the loss of always answering with how often each class comes, its entropy (Miller and Madow); of few
    targets that of equal probabilities, which is no less. ``uncertainty``: the standard error of the loss beyond it.
    ``entropy``: that of the predictions, which a network that knows how little it knows has as its loss.
    """
    found, places = torch.unique(target, return_inverse=True)
    counts = torch.bincount(places).double()
    total = float(counts.sum())
    if len(counts) < 2:
        return {}
    of_each = torch.full_like(counts, math.log(classes if total < FEWEST_TARGETS else len(found)))
    constant = float(of_each[0])
    if total >= FEWEST_TARGETS and total >= ENOUGH * len(counts):
        of_each = -(counts / total).log()
        constant = float((counts / total * of_each).sum()) + (len(counts) - 1) / (2 * total)
    return {
        "constant": constant,
        "entropy": float(torch.special.entr(some.clamp(min=0.0)).sum(-1).mean()),
        "uncertainty": float((losses.double() - of_each[places]).std()) / math.sqrt(total),
    }


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
    facts = [{name: value for name, value in task.items() if name not in MEASURED} for task in tasks]
    if (
        not tasks
        or not tasks[0]
        or any(each != facts[0] for each in facts)
        or loss is None
        or not math.isfinite(loss)
    ):
        return {}
    measured = {
        name: [task[name] for task in tasks] for name in MEASURED if all(name in task for task in tasks)
    }
    means = {name: sum(values) / len(values) for name, values in measured.items()}
    if "uncertainty" in means:
        means["uncertainty"] = math.hypot(*measured["uncertainty"]) / len(tasks)
    return {**facts[0], **means, "loss": loss}


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


Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]


def loss_value(output: Any, batch: Any, loss: Loss | None, *, required: bool) -> torch.Tensor | None:
    """The scalar loss of an output: what the user's function gives, or the output's own.

    ``output, batch``: what the model returned, and for what.
    Raises CaptureError: Where there must be a loss and there is no scalar.
    """
    if loss is not None:
        value = loss(output, batch)
    else:
        value = getattr(output, "loss", None)
        if value is None and isinstance(output, Mapping):
            value = output.get("loss")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value
    if required or loss is not None:
        came = (
            "no loss"
            if value is None
            else f"a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        )
        raise CaptureError(
            f"gradients need a scalar loss, but there is {came}: add labels to the batch, or pass "
            "loss=lambda output, batch: …"
        )
    return None
