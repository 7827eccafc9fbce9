"""Does the loss still fall? Verdicts on the loss of the last measured step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.verdicts.age import (
    NOTHING_LEARNED,
    number_or_none,
    share_of_constant,
    share_of_guessing,
    task_of,
)
from depthscope.diagnostics.verdicts.calibration import DEFAULT
from depthscope.diagnostics.verdicts.causes import anywhere, overlapping
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, number, verdict


@verdict(
    metric="loss",
    judges=Number("number of losses that are not finite", range="0 or more"),
    limits=Limits(fail=0.0),
    follows_from={"residual_not_finite": anywhere, "mixing_not_finite": anywhere},
)
def loss_not_finite(loss_not_finite: xr.DataArray) -> Iterable[Profile]:
    """The loss is NaN or infinite: its gradients would destroy the weights.

    Stop, go back to a checkpoint from before, and look at that batch: labels that are all ignored, a logarithm of zero, an
    overflow in half precision. Then lower the learning rate or the loss scale, and clip the gradient.
    """
    yield Profile(loss_not_finite, "the number of losses that are not finite is")


# Heuristics: a quarter of the loss at the start is more than the noise of batches and a warm-up; three quarters are nearly all
# that a training can learn.
@verdict(
    metric="loss",
    judges=Number(
        "rise of the loss above its lowest value, relative to the start",
        "(loss now − lowest) / first",
        "0 or more",
    ),
    limits=Limits(warn=0.25, fail=0.75),
    follows_from={"loss_not_finite": anywhere},
)
def diverged_loss(loss_rise: xr.DataArray, loss: xr.DataArray) -> Iterable[Profile]:
    """The loss diverged: it has risen far above its lowest value.

    Go back to a checkpoint from before the rise, with a lower learning rate, a longer warm-up or a tighter clip of the
    gradient; see what grew first. Without meaning for a loss that no training lowers, as an adversary's.
    """
    yield Profile(
        loss_rise,
        f"the rise of the loss (now {number(float(loss))}) above its lowest value, relative to the start, is",
    )


# Half of the loss at the start is what text models learn in all.
@verdict(
    metric="loss",
    judges=Number(
        "largest rise of the loss above its lowest value before, relative to the start",
        "max (loss − lowest) / first",
        "0 or more",
    ),
    limits=Limits(info=0.25, warn=0.5),
    follows_from={"diverged_loss": anywhere},
)
def loss_spike(loss_spike: xr.DataArray, loss_rise: xr.DataArray) -> Iterable[Profile] | None:
    """The loss spiked: it rose far above its lowest value, and came down again.

    See what grew before it: gradients, logits of attention or a learning rate at its peak. A longer warm-up, a tighter clip or
    leaving out the batches of those steps removes most spikes.
    """
    if float(loss_rise) > 0.5 * float(loss_spike):  # it has not come down: see `diverged_loss`
        return None
    return [
        Profile(loss_spike, "the largest rise of the loss above its lowest value, relative to the start, is")
    ]


WORSE = 1.05
# Times the loss of guessing, above which no start of a training is. Heuristic.
NO_START = 2.0


# A constant answer knows how often each class comes and nothing of the input. Networks learn that in their first steps: one
# that loses more, beyond the noise of a sample, has nothing left of what it learned, or sees what it was never trained on.
@verdict(
    metric="loss",
    judges=Number(
        "loss, less the noise of the sample, over that of a constant answer",
        "(loss − 1.645 se) / H(classes)",
        "0 or more",
    ),
    limits=Limits(warn=NOTHING_LEARNED, fail=WORSE),
    follows_from=dict.fromkeys(
        ("loss_not_finite", "residual_not_finite", "mixing_not_finite", "diverged_loss"), anywhere
    ),
    before_training=True,
)
def worse_than_constant(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The network is no better than an answer that never changes.

    See whether every weight is in its place, the labels belong to the inputs, and the learning rate is right, and read the
    other findings. On data of another kind than it was trained on this says only that they are new to it.
    """
    share, task = share_of_constant(attrs), task_of(attrs)
    if share is None or attrs.get("untouched"):  # of which `untrained_weights` says so
        return
    error = (number_or_none(task.get("uncertainty")) or 0.0) / float(task["constant"])
    yield Profile(
        xr.DataArray(share - ONE_SIDED * error),
        "the loss, relative to that of always answering with how often each class comes (less the noise of the sample), is",
        at_any_age=min(share, share_of_guessing(attrs) or share) > NO_START,
    )


ONE_SIDED = 1.645  # standard errors of a one-sided 95 % interval


# Healthy trained networks lose what their predictions expect, or less: the entropy of classes; of numbers, the variance of the
# targets less that of the predictions. What these claim to know is no less than a fifth of all that there is to know.
# Heuristics.
LEAST_CLAIM = 0.2


@verdict(
    metric="loss",
    judges=Number(
        "part of what the predictions claim to know that is wrong",
        "(loss − 1.645 se − expected) / max(constant − expected, constant / 5)",
        "0 and below where they are right",
    ),
    limits=Limits(warn=0.15, fail=0.5),
    follows_from=dict.fromkeys(
        ("loss_not_finite", "residual_not_finite", "mixing_not_finite", "worse_than_constant"), anywhere
    ),
    before_training=True,
)
def surer_than_right(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The predictions are overconfident: they are surer than they are right.

    Training makes them as sure as they are right. See whether inputs come as in training (scale, order, padding, ids), labels
    belong to them, and every weight is in its place; on new data it may be that the network has learned the old by heart.
    """
    task = task_of(attrs)
    known = [number_or_none(task.get(name)) for name in ("loss", "expected", "constant", "expected_error")]
    if None in known or attrs.get("untouched"):
        return
    loss, expected, constant, error = (float(value or 0.0) for value in known)
    claimed = max(constant - expected, LEAST_CLAIM * constant)
    sentence = (
        f"The loss, {number(loss)}, is above what the predictions themselves expect, {number(expected)}: they claim to know "
        f"{number(constant - expected)} more than a constant answer ({DEFAULT})."
    )
    words = "of what the predictions claim to know, the part that is wrong is"
    wrong = (loss - ONE_SIDED * error - expected) / claimed
    yield Profile(xr.DataArray(wrong), words, sentence=sentence if wrong > 0.0 else "")


# A block that no gradient reaches, or whose output nothing uses, stays as it was drawn.
@verdict(
    metric="loss",
    judges=Number("number of blocks, or of checkpoints, that look untrained", range="0 or more"),
    limits=Limits(warn=0.0),
    follows_from=dict.fromkeys(
        ("cut_gradient", "vanishing_gradient", "idle_layer", "same_representation"), overlapping
    ),
)
def untrained_weights(
    attrs: Mapping[str, Any], residual_norm: xr.DataArray | None = None
) -> Iterator[Profile]:
    """These weights look untrained.

    Of a checkpoint: see which names of the file were not found in the model, and load it with strict=True. Blocks that were
    just added begin so.
    """
    blocks, share = attrs.get("untouched_blocks") or [], share_of_guessing(attrs)
    if residual_norm is not None and _are_left_out(blocks, residual_norm, share):
        named = ", ".join(map(str, blocks))
        yield Profile(
            residual_norm["layer"].isin(blocks).astype(float).assign_coords(residual_norm["depth"].coords),
            "the number of blocks that look untrained is",
            sentence=f"Every bias and gain of block {named} has its initial value, and others of the network do not; "
            f"expected all or none ({DEFAULT}).",
        )
    if attrs.get("checkpoint"):
        is_untouched = bool(attrs.get("untouched"))
        sentence = f"Every bias and gain of this checkpoint has its initial value; expected trained ones ({DEFAULT})."
        yield Profile(
            xr.DataArray(float(is_untouched)),
            "the number of checkpoints that look untrained is",
            sentence=sentence if is_untouched else "",
        )


def _blocks_of(residual_norm: xr.DataArray) -> set[int]:
    return {*residual_norm["layer"].values.tolist()} - {-1}


def _are_left_out(blocks: Any, residual_norm: xr.DataArray, share: float | None) -> bool:
    """Whether untouched blocks are no design: they are few, the network has learned something, or its norms have."""
    if not blocks or "layer" not in residual_norm.coords:
        return False
    every = _blocks_of(residual_norm)
    few_or_all = 2 * len(blocks) < len(every) or len(blocks) == len(every)
    return few_or_all or (share is not None and share < NOTHING_LEARNED)


@verdict(
    metric="loss",
    judges=Number("number of blocks with the weights of another one", range="0 or more"),
    limits=Limits(warn=0.0),
    follows_from={"untrained_weights": overlapping},
    before_training=True,
)
def equal_blocks(attrs: Mapping[str, Any], residual_norm: xr.DataArray) -> Iterator[Profile]:
    """Several blocks have identical weights.

    They are not shared, so that training would have parted them: look for a checkpoint whose keys are mapped to the wrong
    blocks, or blocks that were copied to make a network deeper. Layers that are made by copying one begin so.
    """
    blocks = attrs.get("equal_blocks") or []
    if "layer" not in residual_norm.coords:
        return
    named = ", ".join(map(str, blocks))
    yield Profile(
        residual_norm["layer"].isin(blocks).astype(float).assign_coords(residual_norm["depth"].coords),
        "the number of blocks with the weights of another one is",
        sentence=f"Blocks {named} have the same weights in memory of their own; expected none ({DEFAULT})."
        if blocks
        else "",
    )
