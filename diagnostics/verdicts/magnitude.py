"""Does the signal explode, fade or stop being a number? Verdicts on states, gradients and gains.

Limits without a comment or a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS
from depthscope.diagnostics.schema import CUT_GRADIENT, NOT_FINITE, WITHOUT_GRADIENT
from depthscope.diagnostics.verdicts.causes import anywhere, deeper, from_there_on
from depthscope.diagnostics.verdicts.declaration import ALTUP, Limits, Profile, verdict
from depthscope.diagnostics.verdicts.finding import Severity
from depthscope.diagnostics.verdicts.locations import place, span

DIRECTIONS = ("forward", "backward")

# A sum of branches grows over the later half of the depth by √2 where they are independent, and by 2 where they all
# agree; a state that is multiplied grows exponentially. Heuristic: between 2 and that.
LATE_GROWTH = 3.0
# A stream with less than half of its sum left counts as faded. Heuristic.
FADED = 0.5

CANCELLED = (
    f"Entries of both signs cancel in it: no singular value of the mixing is below {FADED}, so no stream fades, but "
    "what all streams have in common does."
)


def _not_finite(values: xr.DataArray, axis: str) -> xr.DataArray:
    """How many tokens are not finite at each position of an axis; 1 where that was not counted."""
    if "stream" in values.dims:
        # Training curves have no mean over streams: of several, only the streams themselves count.
        values = values.sel(stream=[s for s in values["stream"].values.tolist() if s != "mean"] or ["mean"])
    missing = values.isnull().any([dim for dim in values.dims if dim != axis]).astype(float)
    counts = values.attrs.get(NOT_FINITE, {})
    numbers = [
        counts.get(str(position), found)
        for position, found in zip(missing[axis].values, missing.values, strict=True)
    ]
    return missing.copy(data=np.array(numbers, dtype=float)).where(missing > 0, 0.0)


@verdict(metric="residual_norm", limits=Limits(fail=0.0), follows_from={"mixing_not_finite": from_there_on})
def residual_not_finite(residual_norm: xr.DataArray) -> Iterable[Profile]:
    """The residual has NaN or infinities.

    Look at the block before the first such depth: overflow in half precision, a division by zero in a norm,
    or exploded weights. Rerun that block in float32 and lower the learning rate.
    """
    yield Profile(
        _not_finite(residual_norm, "depth"), "the number of tokens whose state is not finite is", first=True
    )


@verdict(metric="mixing_gain", limits=Limits(fail=0.0), follows_from={"residual_not_finite": deeper})
def mixing_not_finite(mixing_gain: xr.DataArray) -> Iterator[Profile]:
    """Mixing matrices have NaN or infinities.

    Look at the logits of that connection, and at the norm of what they are computed from: overflow in half
    precision, or a division by zero. No product with it is known, so later composites are undefined.
    """
    yield Profile(
        _not_finite(mixing_gain.sel(reduction="mean"), "connection"),  # training curves have no quantiles
        "the number of tokens whose mixing matrix is not finite is",
        first=True,
    )


@verdict(metric="residual_norm", limits=Limits(fail=0.0))
def dead_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state is zero: nothing is passed on.

    Look at the block before the first such depth: a branch or a skip that is multiplied by zero, a ReLU that no
    token passes, or values that half precision rounds to zero.
    """
    norm = _one_view(residual_norm)
    zero = np.flatnonzero(norm.values == 0)
    where = "" if not len(zero) else span(norm, zero) if len(zero) > 1 else place(norm, int(zero[0]))
    yield Profile(
        (norm == 0).astype(float).where(norm.notnull()),
        "the number of depths at which the state is zero is",
        first=True,
        sentence=f"The state is zero {where}, where any size above 0 is expected ({OURS})." if where else "",
    )


# Heuristic: a hundred independent unit branches grow by 10 and agreeing ones by 100, so that 1e4 leaves room for a small
# embedding. Beyond 1e8 the sum no longer resolves the embedding in float32, whose spacing is 1.2e-7.
@verdict(
    metric="residual_norm", limits=Limits(warn=1e4, fail=1e8), follows_from={"exploding_gradient": anywhere}
)
def exploding_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state grows without measure through the depth.

    Scale branches by 1/√depth, normalise their input, or look for a skip that multiplies by more than 1.
    """
    yield from _relative_size(residual_norm)


# The inverse of those of an exploding state.
@verdict(
    metric="residual_norm",
    limits=Limits(warn=1e-4, fail=1e-8, above=False),
    follows_from={"vanishing_gradient": anywhere},
)
def vanishing_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state fades through the depth.

    Keep the skip path at full strength, or raise the initial scale of layers without one.
    """
    yield from _relative_size(residual_norm)


def _relative_size(norm: xr.DataArray) -> Iterator[Profile]:
    """Size of the state over that of the embedding, where neither is zero (see `dead_state`)."""
    norm = _one_view(_before_final_norm(norm))
    first = norm.isel(depth=0, drop=True)
    yield Profile(
        (norm / first.where(first > 0)).where(norm > 0),
        "the size of the states, relative to that at the embedding, is",
    )


@verdict(
    metric="gradient_norm",
    limits=Limits(fail=0.0),
    follows_from={"residual_not_finite": anywhere, "mixing_not_finite": anywhere},
)
def gradient_not_finite(gradient_norm: xr.DataArray) -> Iterable[Profile]:
    """The gradient has NaN or infinities.

    Lower the loss scale or the learning rate, clip the gradient, and look at the loss itself first.
    """
    absent = gradient_norm["depth"].isin(gradient_norm.attrs.get(WITHOUT_GRADIENT, []))
    yield Profile(
        _not_finite(gradient_norm, "depth").where(~absent),
        "the number of tokens whose gradient is not finite is",
    )


@verdict(metric="gradient_norm", limits=Limits(fail=0.0))
def cut_gradient(gradient_norm: xr.DataArray) -> Iterable[Profile] | None:
    """A block passes no gradient on: everything below it is not trained.

    Look in that block for a detach, a no_grad, an argmax or a rounding on the way from its input to its output, the skip
    included. Where it is meant, as a frozen lower part is, freeze those weights: then no gradient is expected there.
    """
    cut, without = (gradient_norm.attrs.get(name, []) for name in (CUT_GRADIENT, WITHOUT_GRADIENT))
    depths = gradient_norm["depth"].values.tolist() if "depth" in gradient_norm.coords else []
    lost = gradient_norm.isel(stream=0, drop=True).copy(data=np.zeros(gradient_norm.sizes["depth"]))
    if not cut:
        return [Profile(lost, "the number of states whose gradient is cut is")]
    # A state that is detached has no graph itself: the cut is above the last state in a row that no gradient reached.
    top = depths.index(max(cut))
    while top + 1 < len(depths) and depths[top + 1] in without:
        top += 1
    lost[depths.index(min(cut)) : top + 1] = 1.0
    where = place(lost, top)
    how = "is detached where it leaves its block or where the next one reads it"
    if depths[top] in cut:
        how = "is read by a block that passes no gradient on"
    nearest = f" The nearest state that gets one is {place(lost, top + 1)}." if top + 1 < len(depths) else ""
    sentence = (
        f"No gradient reaches the {int(lost.sum())} states up to the one {where}, where every state should get one "
        f"({OURS}): it {how}.{nearest}"
    )
    return [Profile(lost, "", sentence=sentence)]


# Heuristic, between the 1.6 of mHC and the 3000 of an unstable HC that the mHC paper reports; so for one connection.
@verdict(
    metric="composite_gain",
    limits=Limits(warn=10.0, fail=100.0),
    not_for=ALTUP,
    follows_from={"single_gain_explosion": from_there_on, "constant_mixing": anywhere},
)
def gain_explosion(composite_gain: xr.DataArray) -> Iterator[Profile]:
    """The signal explodes through the product of the mixing matrices.

    Constrain H_res (mHC), start it at the identity, lower its learning rate or decay its dynamic part. The
    mHC paper reports about 3000 for an unstable 27B HC and 1.6 for mHC.
    """
    for direction in DIRECTIONS:
        # The 99th percentile over tokens: one outlier token is no explosion. Heuristic.
        gain = composite_gain.sel(direction=direction, reduction="p99", drop=True)
        yield Profile(
            gain,
            f"the {direction} gain of the mixing from the embedding on (p99 over tokens) is",
        )


@verdict(metric="mixing_gain", limits=Limits(warn=10.0, fail=100.0))
def single_gain_explosion(mixing_gain: xr.DataArray) -> Iterator[Profile]:
    """One mixing matrix alone amplifies the streams.

    Look at the dynamic part of that connection: its scale, and the norm of what it is computed from.
    """
    for direction in DIRECTIONS:
        # Training curves have no quantiles, which sums cannot give.
        reduction = "p99" if "p99" in mixing_gain["reduction"].values else "max"
        gain = mixing_gain.sel(direction=direction, reduction=reduction, drop=True)
        yield Profile(gain, f"the {direction} gain of one connection ({reduction} over tokens) is")


@verdict(
    metric="composite_attenuation",
    limits=Limits(warn=FADED, fail=0.05, above=False),
    not_for=ALTUP,
    follows_from={"sinkhorn_not_converged": from_there_on, "one_sided_mixing": anywhere},
)
def attenuation(
    composite_attenuation: xr.DataArray, composite_singular_value: xr.DataArray
) -> Iterator[Profile]:
    """A stream fades through the product of the mixing matrices; the largest gain hides it.

    Backward: more Sinkhorn iterations, or end them on columns; all error of stopping early sits in one of the
    two sums. Forward: some stream is no longer fed; look at its row of H_res.
    """
    least = composite_singular_value.isel(component=-1, drop=True).sel(reduction="p1", drop=True)
    for direction in DIRECTIONS:
        weakest = composite_attenuation.sel(direction=direction, reduction="p1", drop=True)
        side = "row" if direction == "forward" else "column"
        # Signed entries can cancel in a sum although no stream fades: then the smallest singular value is larger. Where no
        # entry is negative it is below every sum, and the sum is judged.
        faded = weakest.copy(data=np.maximum(weakest.values, least.values))
        cancelled = not (faded < FADED).any()
        yield Profile(
            weakest if cancelled else faded,
            f"the weakest {side} sum of the mixing from the embedding on ({direction}) is",
            ceiling=Severity.INFO if cancelled else Severity.FAIL,
            note=CANCELLED if cancelled else "",
        )


# Within a factor of 10 across depth is a rule of thumb; the fail limits are ours.
@verdict(
    metric="backward_gain", limits=Limits(warn=10.0, fail=1000.0), follows_from={"gain_explosion": anywhere}
)
def exploding_gradient(
    backward_gain: xr.DataArray, residual_norm: xr.DataArray, relative_gradient: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The gradient grows on its way back through the depth.

    Scale branches by 1/√depth, normalise before the branches, clip; check the first blocks' learning rate.
    """
    yield from _gradient_profiles(backward_gain, residual_norm, relative_gradient, growing=True)


@verdict(
    metric="backward_gain",
    limits=Limits(warn=0.1, fail=1e-3, above=False),
    follows_from={"dead_state": anywhere},
)
def vanishing_gradient(
    backward_gain: xr.DataArray, residual_norm: xr.DataArray, relative_gradient: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The gradient vanishes on its way back through the depth.

    Check that the skip path is unbroken and not scaled down, and that no norm sits on it; raise the branches'
    initial scale in the early blocks.
    """
    yield from _gradient_profiles(backward_gain, residual_norm, relative_gradient, growing=False)


def _gradient_profiles(
    gain: xr.DataArray, norm: xr.DataArray, relative: xr.DataArray | None, *, growing: bool
) -> Iterator[Profile]:
    """Gain against the last state before a final norm; no more than INFO where a sum of branches explains it.

    Branches that normalise their input make the gradient inversely proportional to the state: then ‖δ‖·‖x‖, per token
    where it is known, stays constant. It does so in any network that multiplies the state by a factor too; but a sum
    of such branches does not shrink, and does not multiply late in the depth.
    """
    sensitivity = gain * norm if relative is None else relative
    gain, sensitivity, norm = (
        _one_view(_before_final_norm(profile)) for profile in (gain, sensitivity, norm)
    )
    if gain.sizes["depth"] < 2:
        return
    gain, sensitivity = (
        profile / profile.isel(depth=-1, drop=True).where(lambda last: last > 0)
        for profile in (gain, sensitivity)
    )
    # Multiplication shows in the later half; the first branches dwarf the embedding in a healthy sum as well.
    summed = bool(norm.isel(depth=-1) <= LATE_GROWTH * norm.isel(depth=norm.sizes["depth"] // 2))
    explained = growing and summed and bool(sensitivity.max() <= 10.0)
    note = (
        "Relative to the size of the state it stays within a factor of 10: it follows the size of the states, "
        "as where every branch normalises its input and is added."
    )
    yield Profile(
        gain,
        "the gradient's norm, relative to that at the last block, is",
        ceiling=Severity.INFO if explained else Severity.FAIL,
        note=note if explained else "",
    )


def _before_final_norm(profile: xr.DataArray) -> xr.DataArray:
    if "site" not in profile.coords:
        return profile
    # The final norm resets the size, so that what comes before it would look as if it exploded or faded.
    before = np.flatnonzero(profile["site"].values != "final")
    return profile.isel(depth=slice(0, int(before[-1]) + 1)) if len(before) else profile


def _one_view(profile: xr.DataArray) -> xr.DataArray:
    """The mean over streams, or the root mean square of the streams where the mean is unknown."""
    mean = profile.sel(stream="mean", drop=True)
    if mean.notnull().any() or profile.sizes["stream"] == 1:
        return mean
    return (profile**2).mean("stream") ** 0.5
