"""Does the loss still fall? Verdicts on the loss of the last measured step."""

from __future__ import annotations

from collections.abc import Iterable

import xarray as xr

from depthscope.diagnostics.verdicts.causes import anywhere
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, number, verdict


@verdict(
    metric="loss",
    limits=Limits(fail=0.0),
    follows_from={"residual_not_finite": anywhere, "mixing_not_finite": anywhere},
)
def loss_not_finite(loss_not_finite: xr.DataArray) -> Iterable[Profile]:
    """The loss is NaN or infinite: the step teaches nothing, and its gradients spoil the weights.

    Stop, go back to a checkpoint from before, and look at that batch: labels that are all ignored, a logarithm of zero, an
    overflow in half precision. Then lower the learning rate or the loss scale, and clip the gradient.
    """
    yield Profile(loss_not_finite, "the number of losses that are not finite is")


# Heuristics: a quarter of the loss at the start is more than the noise of batches and a warm-up; three quarters are nearly all
# that a training can learn.
@verdict(metric="loss", limits=Limits(warn=0.25, fail=0.75), follows_from={"loss_not_finite": anywhere})
def diverged_loss(loss_rise: xr.DataArray, loss: xr.DataArray) -> Iterable[Profile]:
    """The loss has risen again, far above the lowest that it had.

    Go back to a checkpoint from before the rise, with a lower learning rate, a longer warm-up or a tighter clip of the
    gradient; see what grew first. Without meaning for a loss that no training lowers, as an adversary's.
    """
    yield Profile(
        loss_rise,
        f"the loss is {number(float(loss))}, and its rise above the lowest one, over the loss at the start, is",
    )
