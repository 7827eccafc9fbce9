"""Did training move the mixing, or did initialisation and weight decay alone? Verdicts that compare with a replay.

Limits without a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.causes import anywhere
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, number, verdict

# Logarithm of half: a contraction by less needs no explanation. Heuristic.
HALF = float(np.log10(0.5))
# Replaces exactly nothing, so that its logarithm is finite.
NOTHING = 1e-300
# Saturation of a projection whose logits are too far apart: those of −8 off the diagonal have 0.998. Heuristic.
NEARLY_PERMUTATIONS = 0.99


# A hundredth of the scale of the identity, the distance of entries that moved by 0.01. Heuristic.
@verdict(metric="initial_distance", limits=Limits(warn=0.01, above=False))
def unmoved_mixing(initial_distance: xr.DataArray) -> Iterator[Profile]:
    """No mixing matrix has moved from its initialisation.

    See whether the optimizer has the logits, and what gradient they get: those that Sinkhorn maps to entries
    near 0 or 1 get hardly any. Normal before training.
    """
    most = initial_distance.sel(reduction="median", drop=True).max("connection")
    yield Profile(most, "the largest distance of any H_res from its initial value is")


@verdict(
    metric="replayed_deflated_gain",
    limits=Limits(warn=0.1, above=False),
    follows_from={"unmoved_mixing": anywhere},
)
def decayed_mixing(
    deflated_gain: xr.DataArray, replayed_deflated_gain: xr.DataArray
) -> Iterable[Profile] | None:
    """Initialisation and weight decay alone explain how much the streams lose of their differences.

    Training has not shaped the mixing: leave its logits out of weight decay, give them a higher learning rate, and
    look at their gradient.
    """
    measured = np.log10(deflated_gain.sel(reduction="median", drop=True).clip(min=NOTHING))
    replayed = np.log10(replayed_deflated_gain.clip(min=NOTHING))
    total = float(np.fmin(measured[-1], replayed[-1]))
    if not total < HALF:  # hardly anything is lost, or it is not known (NaN)
        return None
    left = number(10.0 ** float(measured[-1]))
    explained = number(10.0 ** float(replayed[-1]))
    decay = number(replayed_deflated_gain.attrs["decay"])
    return [
        Profile(
            abs(measured - replayed).max() / abs(total),
            "the relative change of the streams' contraction (its logarithm) by training is",
            note=(
                f"A fraction of {left} of the differences between streams is left; the initial matrices after weight "
                f"decay (logits times {decay}) alone leave {explained}."
            ),
        )
    ]


# Off-diagonal logits of −8 let at most 1.3e-3 through, those of −6 at most 1e-2; a uniform H_res of four streams 0.25. A note,
# since an optimizer that divides by the size of the gradient moves such logits all the same, only slowly.
@verdict(metric="logit_gradient_share", limits=Limits(info=2e-3, above=False))
def saturated_logits(logit_gradient_share: xr.DataArray, logit_saturation: xr.DataArray) -> Iterator[Profile]:
    """H_res can hardly learn: almost none of its gradient reaches its logits.

    Softmax and Sinkhorn of logits that are far apart (off-diagonal ones near −8) let no gradient through. Begin with logits
    nearer to each other, such as −3 off the diagonal, or leave them out of weight decay and give them a higher learning rate.
    """
    saturation = float(logit_saturation.sel(reduction="median", drop=True).min("connection"))
    # The gradient may be small for another reason: where streams are equal, as in the first connection, or are averaged
    # behind the last one, it lies along what the projection takes away.
    if saturation >= NEARLY_PERMUTATIONS:
        yield Profile(
            logit_gradient_share.max("connection"),
            "the largest fraction of the gradient of H_res that reaches its logits at any connection is",
            note=f"Every projection lets through less than {number(1 - saturation)} of what a uniform one does.",
        )
