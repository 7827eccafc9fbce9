"""Do the weights belong together as they are used? The loss along the scale of what each module gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.numbers import number, percent
from depthscope.diagnostics.verdicts.age import KNOWS, MANY_STEPS, MOVED, RESCALED, number_or_none, task_of
from depthscope.diagnostics.verdicts.calibration import DEFAULT
from depthscope.diagnostics.verdicts.causes import anywhere
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, verdict

# What a network has to lose is no less than this share of the loss of a constant answer: of one that has learned hardly
# anything a small change of the loss would be much of it. Heuristic.
LEAST_REACH = 0.2
# A network that is right more often than its predictions expect, by more than this share of what they claim to know, is in the
# middle of its training, where scales still grow, or has lost its scales: the loss alone does not tell which. Heuristic.
UNSURE = 0.3


def to_lose(attrs: Mapping[str, Any]) -> float | None:
    """What the loss is below that of a constant answer, in nats; None where either is not known."""
    task = task_of(attrs)
    loss, most = number_or_none(task.get("loss")), number_or_none(task.get("constant", task.get("guessing")))
    return None if loss is None or not most else max(most - loss, LEAST_REACH * most)


# Beyond the interval, trained networks of more than 100 kinds regain 0.05 at most.
@verdict(
    metric="loss",
    judges=Number(
        "share of what the loss can be below that of a constant answer that other scales regain",
        "gained / (constant − loss + gained)",
        "0 to 1",
    ),
    limits=Limits(warn=0.08, fail=0.5),
    follows_from=dict.fromkeys(("loss_not_finite", "residual_not_finite", "mixing_not_finite"), anywhere),
)
def off_minimum(
    attrs: Mapping[str, Any],
    step: xr.DataArray | None = None,
    first_weight_distance: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """The weights are not used as they were trained: other scales lower the loss.

    Training leaves each of these scales at a minimum of the loss. Look at the modules that are named for a factor of attention
    logits or norms, an eps, a gain that was not restored, weights of another block; or the data are foreign to the network.
    """
    result = attrs.get(RESCALED)
    result = result if isinstance(result, Mapping) else {}
    reach, loss = to_lose(attrs), number_or_none(result.get("loss"))
    best = number_or_none(result.get("rescaled"))
    if reach is None or loss is None or best is None:
        return
    constant = number_or_none(task_of(attrs).get("constant")) or float("inf")
    if min(loss, best) > KNOWS * constant:
        return  # what still has to learn can do so by its scales too
    reaches = number_or_none(result.get("half_width")) or 0.0
    gained = max(loss - best - reaches, 0.0)
    share = gained / (reach + gained)
    most = ", ".join(f"{name} × {number(factor)}" for name, factor in result.get("most") or ())
    more = ", …" if (number_or_none(result.get("modules")) or 0.0) > len(result.get("most") or ()) else ""
    interval = f" ± {number(reaches, digits=2)}" if reaches else ""
    sentence = (
        f"With factors on what {result.get('modules')} modules give ({most}{more}) the loss falls from "
        f"{number(loss)} to {number(best)}{interval}: {percent(share)} of what it then is below that of a constant answer "
        f"({DEFAULT})."
    )
    words = "of what the loss can be below that of a constant answer, other scales regain"
    expected = number_or_none(task_of(attrs).get("expected"))
    is_unsure = expected is not None and expected - loss > UNSURE * max(
        constant - expected, LEAST_REACH * constant
    )
    went_far = first_weight_distance is not None and float(first_weight_distance.max()) > MOVED
    may_still_learn = is_unsure and not went_far and (step is None or float(step) < MANY_STEPS)
    if expected is not None and may_still_learn:
        sentence += (
            f" Its predictions expect a loss of {number(expected)}: a network in the middle of its training is as unsure, and "
            "this is then no fault."
        )
    yield Profile(xr.DataArray(share), words, sentence=sentence, note_only=may_still_learn)
