"""What is the loss of an output, and what does it measure? Its classes, and what a constant answer loses, off its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.tensors import tensors_in

MOST_NODES = 64  # from the scalar back: a mean over tokens, a few masks, the cross entropy


def read_task(loss: torch.Tensor | None, batch: Any) -> dict[str, Any]:
    """What the graph of a loss says of its task; empty where it is no cross entropy and no squared error that torch computes.

    Returns: ``classes``, their number; ``guessing``, the loss of equal probabilities in nats; ``predicts_next``, whether its
    targets are the next tokens of the batch, whatever that of the last token of a sequence is; ``repeats_input``, whether
    they are those tokens; ``targets_per_sequence``, 1 where a sequence has one class; and of a mean what `_compared` says.
    Of squared errors and of yes or no, the latter alone.
    """
    start = None if loss is None else loss.grad_fn
    if start is not None and start.name() in (SQUARES, YES_OR_NO) and start._saved_reduction == 1:
        return _compared_at_numbers(start)
    for node in _nodes(start):
        if not node.name().startswith(("NllLoss", "NLLLoss")):
            continue
        (before, number), target = node.next_functions[0], _saved(node, "target")
        shape = before._input_metadata[number].shape if before is not None else ()
        if not len(shape):
            return {}
        classes = int(shape[1 if len(shape) > 1 else 0])
        sequences = next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim > 1), 0)
        targets = 0 if target is None else target.numel()
        per_sequence = targets // sequences if sequences and targets % sequences == 0 else 0
        is_mean = node is start and getattr(node, "_saved_reduction", None) == 1
        return {
            "classes": classes,
            "guessing": math.log(max(classes, 1)),
            "predicts_next": _are_tokens(target, batch, ahead=1),
            "repeats_input": _are_tokens(target, batch, ahead=0),
            **({"targets_per_sequence": per_sequence} if per_sequence else {}),
            **(_compared_at_node(node, classes) if is_mean else {}),
        }
    return {}


def _saved(node: Any, name: str) -> torch.Tensor | None:
    """What a node keeps for its backward; None where that has run already, which frees it."""
    try:
        found = getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None
    return found.detach() if isinstance(found, torch.Tensor) else None


# Targets for each class that comes: of fewer the frequencies, and with them their entropy, are not known well. Heuristic.
ENOUGH = 4
# Of fewer targets it is not known which classes come.
FEWEST_TARGETS = 100
# Targets of which the entropy of the predictions is known well enough.
PREDICTIONS = 256
ROWS_AT_ONCE = 32
# The smallest probability that one less than it still shows in float32, and how near two ways to the same loss come.
LEAST, SAME_LOSS = 1e-7, 0.01
# Of one mean over batches: what is measured, and no fact of the task.
MEASURED = ("constant", "expected", "uncertainty", "expected_error")


def _compared_at_node(node: Any, classes: int) -> dict[str, float]:
    """What the node of a mean cross entropy says of a constant answer, see `_compared`."""
    target, predicted = _saved(node, "target"), _saved(node, "self")
    if target is None or predicted is None or predicted.ndim < 2:
        return {}
    rows, target = predicted.movedim(1, -1).reshape(-1, classes), target.flatten()
    counted = torch.nonzero(target != IGNORED)[:, 0]
    # Some rows at a time: with a large vocabulary each copy of all of them is as large as the logits.
    expected = _entropy(rows[part].exp() for part in counted[_some(counted)].split(ROWS_AT_ONCE))
    return _compared_classes(-rows[counted, target[counted]], target[counted], expected, classes)


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
    pairs = zip(rows[_some(rows)].split(ROWS_AT_ONCE), target[_some(rows)].split(ROWS_AT_ONCE), strict=True)
    expected = _entropy(len(rows) * part + functional.one_hot(at, classes) for part, at in pairs)
    return _compared_classes(losses, target, expected, classes)


def _some(values: torch.Tensor) -> slice:
    """Which predictions their entropy is taken of."""
    return slice(None, None, max(1, len(values) // PREDICTIONS))


def _entropy(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The entropy of each prediction, from the probabilities of some of them at a time."""
    return torch.cat([torch.special.entr(part.float().clamp_(min=0.0)).sum(-1) for part in parts])


def _compared_classes(
    losses: torch.Tensor, target: torch.Tensor, expected: torch.Tensor, classes: int
) -> dict[str, float]:
    """What a cross entropy has to beat, see `_compared`; empty of one class. ``expected``: the entropies of some predictions.

    The constant answer is how often each class comes, its loss the entropy (Miller and Madow); of too few targets for that,
    as of most text with a large vocabulary, that of equal probabilities of all classes, which is no less.
    """
    _, places = torch.unique(target, return_inverse=True)
    counts = torch.bincount(places).double()
    total = float(counts.sum())
    if len(counts) < 2:
        return {}
    of_each, bias = torch.full_like(counts, math.log(classes)), 0.0
    if total >= FEWEST_TARGETS and total >= ENOUGH * len(counts):
        of_each, bias = -(counts / total).log(), (len(counts) - 1) / (2 * total)
    return _compared(losses, of_each[places] + bias, expected, losses[_some(losses)])


def _compared(
    losses: torch.Tensor, constant: torch.Tensor, expected: torch.Tensor, of_expected: torch.Tensor
) -> dict[str, float]:
    """What a loss has to beat, and what the predictions themselves expect it to be, from both for each target.

    Returns: ``constant``: the loss of the best answer that never changes. ``uncertainty``: the standard error of the loss
    beyond it. ``expected``: what the loss would be if the predictions were as right as they are sure, which training makes
    them. ``expected_error``: the standard error of the loss beyond that.
    """
    beyond, surprise = losses.double() - constant, of_expected.double() - expected.double()
    return {
        "constant": float(constant.mean()),
        "expected": float(expected.double().mean()),
        "uncertainty": float(beyond.std()) / math.sqrt(len(beyond)),
        "expected_error": float(surprise.std()) / math.sqrt(len(surprise)),
    }


SQUARES, YES_OR_NO = "MseLossBackward0", "BinaryCrossEntropyWithLogitsBackward0"
FEWEST_ROWS = 8  # of which each number has a mean and a variance of its own


def _compared_at_numbers(node: Any) -> dict[str, float]:
    """What the node of a mean squared error, or one of yes or no, says of a constant answer, see `_compared_rows`."""
    target, predicted = _saved(node, "target"), _saved(node, "self")
    weights = [_saved(node, name) for name in ("weight", "pos_weight")]
    if target is None or predicted is None or weights != [None, None] or target.shape != predicted.shape:
        return {}
    return _compared_rows(node.name(), target, predicted)


def squares_by_gradient(
    loss: torch.Tensor, predicted: torch.Tensor, gradient: torch.Tensor
) -> dict[str, float]:
    """The same of a mean squared error, read off the gradient of the predictions; empty where it came about otherwise."""
    node = loss.grad_fn
    is_mean = node is not None and node.name() == SQUARES and node._saved_reduction == 1
    if not is_mean or gradient.shape != predicted.shape:
        return {}
    errors = 0.5 * gradient.numel() * gradient.detach().double()
    if not math.isclose(float(errors.square().mean()), float(loss.detach()), rel_tol=SAME_LOSS):
        return {}
    return _compared_rows(SQUARES, predicted - errors, predicted)


def _compared_rows(kind: str, target: torch.Tensor, predicted: torch.Tensor) -> dict[str, float]:
    """What a mean squared error, or one of yes or no, has to beat, see `_compared`; empty where all targets are equal.

    The constant answer has a number for each place of a row, of few rows one for all. Squares expect, if predictions are right
    on average, the variance of the targets less that of the predictions.
    """
    y, p = (each.double().reshape(len(each) if each.ndim else 1, -1) for each in (target, predicted))
    y, p = (y, p) if len(y) >= FEWEST_ROWS else (y.reshape(-1, 1), p.reshape(-1, 1))
    if len(y) < FEWEST_ROWS or not bool((y != y[0]).any()):
        return {}
    mean, unbiased = y.mean(0), len(y) / (len(y) - 1)
    if kind == SQUARES:
        constant = (y - mean).square().mean(1) * unbiased
        losses, claimed = (p - y).square().mean(1), (p - p.mean(0)).square().mean(1) * unbiased
        return _compared(losses, constant, constant - claimed, losses)
    binary = functional.binary_cross_entropy_with_logits
    losses, constant = (binary(each.expand_as(y), y, reduction="none") for each in (p, mean.logit(eps=LEAST)))
    entropy = torch.special.entr(p.sigmoid()) + torch.special.entr((-p).sigmoid())
    return _compared(*((each.mean(1)) for each in (losses, constant, entropy, losses)))


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
    is_same = bool(tasks) and bool(tasks[0]) and all(each == facts[0] for each in facts)
    if not is_same or loss is None or not math.isfinite(loss):
        return {}
    common = [name for name in MEASURED if all(name in task for task in tasks)]
    measured = {name: [task[name] for task in tasks] for name in common}
    means = {name: sum(values) / len(values) for name, values in measured.items()}
    for error in {"uncertainty", "expected_error"} & set(means):
        means[error] = math.hypot(*measured[error]) / len(tasks)
    return {**facts[0], **means, "loss": loss}


def _nodes(start: Any) -> Iterator[Any]:
    """The nodes behind a loss, the nearest first."""
    waiting, seen = [start] if start is not None else [], 0
    while waiting and seen < MOST_NODES:
        node = waiting.pop(0)
        seen += 1
        yield node
        waiting += [before for before, _ in node.next_functions if before is not None]


Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]


def loss_value(output: Any, batch: Any, loss: Loss | None, *, required: bool) -> torch.Tensor | None:
    """The scalar loss of an output: what the user's function gives, or the output's own."""
    if loss is not None:
        value = loss(output, batch)
    else:
        value = getattr(output, "loss", None)
        if value is None and isinstance(output, Mapping):
            value = output.get("loss")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value
    if required or loss is not None:
        shape = tuple(getattr(value, "shape", ()))
        came = "no loss" if value is None else f"a {type(value).__name__} of shape {shape}"
        raise CaptureError(
            f"gradients need a scalar loss, but got {came}: add labels to the batch, or pass "
            "loss=lambda output, batch: … (on the command line: --no-gradients)"
        )
    return None
