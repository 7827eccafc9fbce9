"""Does a step of the optimizer move every module, and none too far? Verdicts on updates of weights.

Limits without a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.schema import FROZEN_MODULES
from depthscope.diagnostics.verdicts.age import NOTHING_LEARNED, share_of_constant
from depthscope.diagnostics.verdicts.calibration import DEFAULT
from depthscope.diagnostics.verdicts.causes import anywhere
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, verdict

NUM_NAMED = 3  # modules in a sentence


# The rule of thumb is 1e-3 a step, see the metric. The ratio is to the weights after the step: a step that replaces a
# module completely has 1.
@verdict(
    metric="update_ratio",
    judges=Number("change of a module's weights in one step over the weights", "‖ΔW‖ / ‖W‖", "0 or more"),
    limits=Limits(warn=0.1, fail=0.5),
    drawn_on=("update_ratio",),
)
def large_update(update_ratio: xr.DataArray) -> Iterator[Profile]:
    """One optimizer step rewrites much of a module.

    Lower its learning rate or warm up longer. In the first steps of Adam it is the learning rate over the size
    of a weight: start such weights larger, or leave those that start near zero to themselves.
    """
    yield Profile(
        update_ratio,
        "the change of the weights in one step, relative to the weights, is",
        metric="update_ratio",
    )


@verdict(
    metric="update_ratio",
    judges=Number("number of modules that are not trained while others are", range="0 or more"),
    limits=Limits(warn=0.0),
)
def frozen_module(update_ratio: xr.DataArray) -> Iterator[Profile]:
    """A module is frozen while the rest is trained.

    Where that is meant, as in fine-tuning from some block on or with adapters, nothing is to do. Else set requires_grad of its
    parameters before the optimizer is made, and look for a no_grad around it.
    """
    frozen = update_ratio["weight"].isin(update_ratio.attrs.get(FROZEN_MODULES, []))
    trained = update_ratio.notnull()
    yield Profile(
        frozen.astype(float).assign_coords(update_ratio.coords).where(trained | frozen),
        "the number of modules that are not trained is",
        sentence=_frozen_words(frozen, trained) if bool(frozen.any()) else "",
        note_only=_is_meant(frozen, trained),
    )


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


def _frozen_words(frozen: xr.DataArray, trained: xr.DataArray) -> str:
    others = int(trained.sum())
    return f"No parameter of {_names(frozen)} is trained, while {others} other modules are ({DEFAULT})."


def _names(chosen: xr.DataArray) -> str:
    names = chosen["weight"].values[chosen.values].astype(object).astype(str).tolist()
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{', '.join(names[:NUM_NAMED])}{more}"


# Of a loop that accumulates gradients, the optimizer steps only now and then.
FEWEST_STEPS = 5


PAST_WARM_UP = 50


# A hundredth of the rule of thumb: ten thousand such steps replace a tenth of the weights or less. No warm-up is as slow after
# its first steps.
@verdict(
    metric="update_ratio",
    judges=Number(
        "change of the weights of half of the modules in one step over the weights",
        "median over modules of ‖ΔW‖ / ‖W‖",
        "0 or more",
    ),
    limits=Limits(warn=1e-5, fail=1e-7, above=False),
)
def slow_updates(update_ratio: xr.DataArray, attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """Nothing is learned, and the optimizer hardly moves the weights.

    Raise the learning rate; see whether a schedule, a clip of the gradient or a loss scale divides it by more than is meant.
    """
    learned = share_of_constant(attrs)
    step = float(update_ratio.coords["step"]) if "step" in update_ratio.coords else 0.0
    if (
        learned is not None
        and learned >= NOTHING_LEARNED
        and step >= PAST_WARM_UP
        and update_ratio.notnull().any()
    ):
        note = f"The loss is {100 * learned:.0f} % of that of a constant answer after {step:.0f} steps."
        words = "of half of the modules the change of the weights in one step, relative to the weights, is"
        yield Profile(update_ratio.median(), words, note=note)


# About the spacing of float32, 1.2e-7: a smaller relative change is rounded away.
@verdict(
    metric="update_ratio",
    judges=Number("change of a module's weights in one step over the weights", "‖ΔW‖ / ‖W‖", "0 or more"),
    limits=Limits(warn=1e-7, above=False),
    drawn_on=("update_ratio",),
)
def lost_update(update_ratio: xr.DataArray, unmoved_steps: xr.DataArray | None = None) -> Iterator[Profile]:
    """An optimizer step leaves a module unchanged.

    Normal where the learning rate is zero. Else see whether the module gets a gradient, the optimizer has it, and half
    precision rounds the update away; where all hardly move, raise the learning rate.
    """
    words = "the change of the weights in one step, relative to the weights, is"
    if update_ratio.notnull().any():
        yield Profile(update_ratio, words, metric="update_ratio")
    # Where no optimizer was seen to touch a weight no single update is known, and the norms show it.
    elif unmoved_steps is not None and float(unmoved_steps) >= FEWEST_STEPS:
        sentence = (
            f"No weight has changed in {float(unmoved_steps):.0f} measured steps, although gradients reach them; a step of "
            f"an optimizer is expected in each of {FEWEST_STEPS} ({DEFAULT})."
        )
        yield Profile(xr.DataArray(0.0), words, sentence=sentence)


# Of the squares of all weights: what a silent module loses the network where it has less is nothing, as of the first query of
# attention over depth, which chooses among one. Heuristic.
SMALL_SHARE = 1e-3


@verdict(
    metric="weight_gradient_norm",
    judges=Number("number of modules whose gradient is exactly zero while others get one", range="0 or more"),
    limits=Limits(warn=0.0),
    follows_from={"cut_gradient": anywhere},
)
def silent_module(
    weight_gradient_norm: xr.DataArray, weight_norm: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The gradient of a module is exactly zero while others get one.

    Look for a module whose output is not used, multiplied by zero or cut off, an expert that no token chooses, or a
    nonlinearity that no token passes.
    """
    known = weight_gradient_norm.notnull()
    if not bool((weight_gradient_norm > 0).any()):
        return
    frozen = weight_gradient_norm["weight"].isin(weight_gradient_norm.attrs.get(FROZEN_MODULES, []))
    zero = (weight_gradient_norm == 0) & ~frozen
    if weight_norm is not None:
        zero = zero & (float((weight_norm**2).where(zero).sum() / (weight_norm**2).sum()) >= SMALL_SHARE)
    sentence = f"The gradient of {_names(zero)} is exactly zero, where others get one ({DEFAULT})."
    yield Profile(
        zero.astype(float).where(known),
        "the number of modules without a gradient is",
        sentence=sentence if bool(zero.any()) else "",
    )
