"""What do the loss, its labels and the updates of the weights show? Verdicts on the training. Limits are set by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.numbers import number, percent
from depthscope.diagnostics.schema import FROZEN_MODULES
from depthscope.diagnostics.verdicts.age import (
    KNOWS,
    NOTHING_LEARNED,
    ONE_SIDED,
    REPAIR,
    Age,
    Repair,
    Task,
    mapping_in,
)
from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, verdict
from depthscope.diagnostics.verdicts.rule import Kind
from depthscope.diagnostics.verdicts.wiring import is_text

# --- the loss ---


# A quarter of the loss at the start is more than the noise of batches and a warm-up; three quarters are nearly all that a
# training can learn.
@verdict(
    Kind.FACT,
    metric="loss",
    judges="rise of the loss above its lowest value, relative to the start",
    formula="(loss now − lowest) / first",
    limits=Limits(warn=0.25, fail=0.75),
)
def diverged_loss(loss_rise: xr.DataArray, loss: xr.DataArray) -> Iterator[Profile]:
    """The loss diverged: it has risen far above its lowest value.

    Go back to a checkpoint from before the rise, with a lower learning rate, a longer warm-up or a tighter clip of the
    gradient; see what grew first. Without meaning for a loss that no training lowers, as an adversary's.
    """
    words = f"rise of the loss (now {number(float(loss))}) above its lowest value, relative to the start"
    yield Profile(loss_rise, words)


# Times the loss of guessing, above which no start of a training is.
NO_START = 2.0


# A constant answer knows how often each class comes and nothing of the input. Networks learn that in their first steps: one
# that loses more, beyond the noise of a sample, has nothing left of what it learned, or sees what it was never trained on.
@verdict(
    Kind.LOSS,
    metric="loss",
    judges="loss, less the noise of the sample, over that of a constant answer",
    formula="(loss − 1.645 se) / H(classes)",
    limits=Limits(warn=NOTHING_LEARNED, fail=1.05),
    follows_from=("diverged_loss",),
)
def worse_than_constant(attrs: Mapping[str, Any], task: Task, age: Age) -> Iterator[Profile]:
    """The network is no better than an answer that never changes.

    See whether every weight is in its place, the labels belong to the inputs, and the learning rate is right, and read the
    other findings. On data of another kind than it was trained on this says only that they are new to it.
    """
    share = task.share_of_constant
    if share is None or task.constant is None or attrs.get("untouched"):  # `untrained_weights` says so
        return
    error = (task.uncertainty or 0.0) / task.constant
    words = "loss, relative to that of always answering with how often each class comes (less the noise of the sample)"
    is_sure = min(share, task.share_of_guessing or share) > NO_START
    may_be_new = not is_sure and task.may_be_new and not age.is_old
    yield Profile(share - ONE_SIDED * error, words, is_sure=is_sure, note_only=may_be_new)


# Healthy trained networks lose what their predictions expect, or less: the entropy of classes; of numbers, the variance of the
# targets less that of the predictions.
@verdict(
    Kind.LOSS,
    metric="loss",
    judges="part of what the predictions claim to know that is wrong",
    formula="(loss − 1.645 se − expected) / max(constant − expected, constant / 5)",
    range="0 and below where they are right",
    limits=Limits(warn=0.15, fail=0.5),
    follows_from=("worse_than_constant",),
)
def surer_than_right(attrs: Mapping[str, Any], task: Task, age: Age) -> Iterator[Profile]:
    """The predictions are overconfident: they are surer than they are right.

    Training makes them as sure as they are right. See whether inputs come as in training (scale, order, padding, ids), labels
    belong to them, and every weight is in its place; on new data it may be that the network has learned the old by heart.
    """
    if task.loss is None or task.expected is None or task.constant is None or task.expected_error is None:
        return
    if attrs.get("untouched"):
        return
    sentence = (
        f"The loss, {number(task.loss)}, is above what the predictions themselves expect, {number(task.expected)}: they claim "
        f"to know {number(task.constant - task.expected)} more than a constant answer ({DEFAULT})."
    )
    yield Profile(task.wrong_part, sentence=sentence, note_only=task.may_be_new and not age.is_old)


# Beyond the interval, trained networks of more than 100 kinds regain 0.05 at most.
@verdict(
    Kind.LOSS,
    metric="loss",
    judges="share of what the loss can be below that of a constant answer that a repair regains",
    formula="gained / (constant − loss + gained)",
    range="0 to 1",
    limits=Limits(warn=0.08, fail=0.5),
)
def off_minimum(attrs: Mapping[str, Any], task: Task, age: Age) -> Iterator[Profile]:
    """The weights are not used as they were trained: a repair lowers the loss.

    Training leaves the network at a minimum of the loss, which the repair that is named regains in part. Look for what it
    names: a factor of attention logits, an axis, an eps, gains or weights that were not restored; or the data are foreign to
    the network.
    """
    found, reach = Repair.of(attrs), task.to_lose
    words, cause = (mapping_in(attrs, REPAIR).get(name) for name in ("repair", "cause"))
    if (
        reach is None
        or found.loss is None
        or found.repaired is None
        or not (is_text(words) and is_text(cause))
    ):
        return
    # What still has to learn can do so by its scales too: either use must surely know something.
    if min(found.loss, found.surely_left) > KNOWS * (task.constant or math.inf):
        return
    regained = found.loss - found.repaired
    gained = max(regained - found.half_width, 0.0)
    share = gained / (reach + gained)
    sentence = (
        f"{words[:1].upper()}{words[1:]} lowers the loss by {number(regained)} ± {number(found.half_width, digits=2)} (from "
        f"{number(found.loss)}), of which the surer part is {percent(share)} of what it then is below that of a constant "
        f"answer ({DEFAULT}). {cause[:1].upper()}{cause[1:]} would look like this."
    )
    may_still_learn = task.is_unsure and not age.is_old
    if may_still_learn:
        sentence += " A network in the middle of its training is as unsure of its predictions, and this is then no fault."
    yield Profile(share, sentence=sentence, note_only=may_still_learn)


# --- weights that are not those of a training ---


# A block that no gradient reaches, or whose output nothing uses, stays as it was drawn; training parts equal blocks.
@verdict(
    Kind.FACT,
    metric="loss",
    judges="number of blocks, or of checkpoints, that look untrained",
    limits=Limits(warn=0.0),
)
def untrained_weights(
    attrs: Mapping[str, Any], task: Task, residual_norm: xr.DataArray | None = None
) -> Iterator[Profile]:
    """These weights look untrained, or copied.

    Of a checkpoint: see which names of the file were not found in the model, or mapped to the wrong blocks, and load it with
    strict=True. Blocks that were just added or copied begin so.
    """
    share = math.inf if task.share_of_guessing is None else task.share_of_guessing
    if task.guessing:  # of a few sequences a loss is low by chance
        share += ONE_SIDED * (task.uncertainty or 0.0) / task.guessing
    if residual_norm is not None and "layer" in residual_norm.coords:
        layers, depth = residual_norm["layer"], residual_norm["depth"].coords
        untouched, equal = (attrs.get(name) or [] for name in ("untouched_blocks", "equal_blocks"))
        # No design: they are few, or the network has learned something.
        is_few = 2 * len(untouched) < len({*layers.values.tolist()} - {-1})
        if untouched and (is_few or share < NOTHING_LEARNED):
            sentence = (
                f"Every bias and gain of block {', '.join(map(str, untouched))} has its initial value, and others of the "
                f"network do not; expected all or none ({DEFAULT})."
            )
            yield Profile(layers.isin(untouched).astype(float).assign_coords(depth), sentence=sentence)
        if equal:
            named = ", ".join(map(str, equal))
            sentence = (
                f"Blocks {named} have the same weights in memory of their own; expected none ({DEFAULT})."
            )
            values = layers.isin(equal).astype(float).assign_coords(depth)
            yield Profile(values, sentence=sentence, note_only=share >= KNOWS)
    if attrs.get("checkpoint"):
        sentence = f"Every bias and gain of this checkpoint has its initial value; expected trained ones ({DEFAULT})."
        yield Profile(float(bool(attrs.get("untouched"))), sentence=sentence)


# --- updates of the weights ---

NUM_NAMED = 3  # modules in a sentence
SILENT = "least of 1 for modules that are trained and 0 for others"


# The rule of thumb is 1e-3 a step, see the metric. The ratio is to the weights after the step: a step that replaces a module
# completely has 1.
@verdict(
    Kind.FRESH,
    metric="update_ratio",
    judges="change of a module's weights in one step over the weights",
    formula="‖ΔW‖ / ‖W‖",
    limits=Limits(warn=0.1, fail=0.5),
)
def large_update(update_ratio: xr.DataArray) -> Iterator[Profile]:
    """One optimizer step rewrites much of a module.

    Lower its learning rate or warm up longer. In the first steps of Adam it is the learning rate over the size
    of a weight: start such weights larger, or leave those that start near zero to themselves.
    """
    yield Profile(update_ratio, metric="update_ratio")


# Of a loop that accumulates gradients, the optimizer steps only now and then.
FEWEST_STEPS = 5
PAST_WARM_UP = 50
# A hundredth of the rule of thumb: ten thousand such steps replace a tenth of the weights or less.
SLOW = 1e-5
LOST = 1e-7


# Of the squares of all weights: what a module without a gradient loses the network where it has less is nothing, as of the
# first query of attention over depth, which chooses among one.
SMALL_SHARE = 1e-3


# About the spacing of float32, 1.2e-7: a smaller relative change is rounded away.
@verdict(
    Kind.FACT,
    metric="update_ratio",
    judges="change of a module's weights in one step over the weights",
    formula="‖ΔW‖ / ‖W‖",
    limits=Limits(warn=LOST, above=False),
    follows_from=("cut_gradient",),
)
def untrained_module(
    task: Task,
    update_ratio: xr.DataArray | None = None,
    unmoved_steps: xr.DataArray | None = None,
    weight_gradient_norm: xr.DataArray | None = None,
    weight_norm: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """A module is not trained: no step moves it, it is frozen, or its gradient is exactly zero.

    Normal in fine-tuning. Else see whether it gets a gradient (a no_grad, an output that is not used, an expert that no token
    chooses), the optimizer has it, and half precision rounds the update away; where all hardly move, raise the learning rate.
    """
    if update_ratio is not None:
        yield from _unmoved(update_ratio, task, unmoved_steps)
        frozen, trained = _frozen(update_ratio), update_ratio.notnull()
        sentence = f"No parameter of {_names(frozen)} is trained, while {int(trained.sum())} other modules are ({DEFAULT})."
        moved = (~frozen).astype(float).assign_coords(update_ratio.coords).where(trained | frozen)
        yield Profile(moved, SILENT, sentence=sentence, note_only=_is_meant(frozen, trained))
    if weight_gradient_norm is not None and bool((weight_gradient_norm > 0).any()):
        zero = (weight_gradient_norm == 0) & ~_frozen(weight_gradient_norm)
        if weight_norm is not None:
            zero = zero & (float((weight_norm**2).where(zero).sum() / (weight_norm**2).sum()) >= SMALL_SHARE)
        sentence = f"The gradient of {_names(zero)} is exactly zero, where others get one ({DEFAULT})."
        yield Profile((~zero).astype(float).where(weight_gradient_norm.notnull()), SILENT, sentence=sentence)


def _unmoved(update_ratio: xr.DataArray, task: Task, unmoved_steps: xr.DataArray | None) -> Iterator[Profile]:
    if update_ratio.notnull().any():
        yield Profile(update_ratio, metric="update_ratio")
        share, step = task.share_of_constant, float(update_ratio.coords.get("step", 0.0))
        middle = float(update_ratio.median())
        if share is not None and share >= NOTHING_LEARNED and step >= PAST_WARM_UP and middle < SLOW:
            sentence = (
                f"The loss is {100 * share:.0f} % of that of a constant answer after {step:.0f} steps, each of which changes "
                f"half of the modules by {number(middle)} of their weights or less, limit {number(SLOW)} ({DEFAULT})."
            )
            yield Profile(0.0, sentence=sentence)
    # Where no optimizer was seen to touch a weight no single update is known, and the norms show it.
    elif unmoved_steps is not None and float(unmoved_steps) >= FEWEST_STEPS:
        sentence = (
            f"No weight has changed in {float(unmoved_steps):.0f} measured steps, although gradients reach them; a step of "
            f"an optimizer is expected in each of {FEWEST_STEPS} ({DEFAULT})."
        )
        yield Profile(0.0, sentence=sentence)


def _frozen(values: xr.DataArray) -> xr.DataArray:
    return values["weight"].isin(values.attrs.get(FROZEN_MODULES, []))


def _is_meant(frozen: xr.DataArray, trained: xr.DataArray) -> bool:
    """Whether what is frozen looks chosen: everything below some block, or all but a few adapters."""
    if int(frozen.sum()) >= int(trained.sum()):
        return True
    if "weight_layer" not in frozen.coords:
        return False
    # Modules outside of the blocks, of layer −1, are in no order.
    layers = frozen["weight_layer"].values
    of_frozen, of_trained = (layers[each.values & (layers >= 0)] for each in (frozen, trained))
    return not len(of_frozen) or not len(of_trained) or bool(of_frozen.max() < of_trained.min())


def _names(chosen: xr.DataArray) -> str:
    names = chosen["weight"].values[chosen.values].astype(object).astype(str).tolist()
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{', '.join(names[:NUM_NAMED])}{more}"
