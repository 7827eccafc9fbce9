"""Does the signal explode, fade or stop being a number? Verdicts forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.verdicts.finding import Severity
from depthscope.diagnostics.verdicts.locations import place, span
from depthscope.diagnostics.verdicts.verdict import ALTUP, Limits, Profile, verdict

DIRECTIONS = ("forward", "backward")

# Over the later half of the depth a sum of like branches grows by √2, and by 2 where they all agree.
LATE_GROWTH = 3.0
# Below this share of its sum a stream counts as faded.
FADED = 0.5

CANCELLED = (
    f"Entries of both signs cancel in it: no singular value of the mixing is below {FADED}, so no stream fades, but "
    "what all streams have in common does."
)


def _not_finite(values: xr.DataArray, axis: str) -> xr.DataArray:
    """How many tokens are not finite at each place of an axis; 1 where that was not counted."""
    if "stream" in values.dims:  # their mean is not known of every run, and counts only where it is alone
        values = values.sel(stream=[s for s in values["stream"].values.tolist() if s != "mean"] or ["mean"])
    missing = values.isnull().any([dim for dim in values.dims if dim != axis]).astype(float)
    counts = values.attrs.get(schema.NOT_FINITE, {})
    told = [
        counts.get(str(place), found)
        for place, found in zip(missing[axis].values, missing.values, strict=True)
    ]
    return missing.copy(data=np.array(told, dtype=float)).where(missing > 0, 0.0)


@verdict(metric="residual_norm", limits=Limits(fail=0.0))
def residual_not_finite(residual_norm: xr.DataArray) -> Iterable[Profile]:
    """The residual holds NaN or infinities.

    Look at the block before the first such depth: overflow in half precision, a division by zero in a norm,
    or exploded weights. Rerun that block in float32 and lower the learning rate.
    """
    yield Profile(
        _not_finite(residual_norm, "depth"), "the number of tokens whose state is not finite is", first=True
    )


@verdict(metric="mixing_gain", limits=Limits(fail=0.0))
def mixing_not_finite(mixing_gain: xr.DataArray) -> Iterator[Profile]:
    """Mixing matrices hold NaN or infinities.

    Look at the logits of that connection, and at the norm of what they are computed from: overflow in half
    precision, or a division by zero. No product with it is known, so later composites are undefined.
    """
    yield Profile(
        _not_finite(mixing_gain.sel(reduction="mean"), "connection"),  # statistics keep no quantiles
        "the number of tokens whose mixing matrix is not finite is",
        first=True,
    )


@verdict(metric="residual_norm", limits=Limits(fail=0.0))
def dead_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state is zero: nothing is passed on.

    Look at the block before the first such depth: a branch or a skip that is multiplied by zero, a ReLU that no
    token passes, or values below what half precision holds.
    """
    norm = _one_view(residual_norm)
    zero = np.flatnonzero(norm.values == 0)
    where = "" if not len(zero) else span(norm, zero) if len(zero) > 1 else place(norm, int(zero[0]))
    yield Profile(
        (norm == 0).astype(float).where(norm.notnull()),
        "the number of depths at which the state is zero is",
        first=True,
        told=f"The state is zero {where}, where any size above 0 is expected (heuristic)." if where else "",
    )


@verdict(metric="residual_norm", limits=Limits(warn=1e4, fail=1e8))
def exploding_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state grows without measure through the depth.

    Scale branches by 1/√depth, normalise their input, or look for a skip that multiplies by more than 1.
    """
    yield from _growth(residual_norm)


@verdict(metric="residual_norm", limits=Limits(warn=1e-4, fail=1e-8, above=False))
def vanishing_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state fades through the depth.

    Keep the skip path at full strength, or raise the initial scale of layers without one.
    """
    yield from _growth(residual_norm)


def _growth(norm: xr.DataArray) -> Iterator[Profile]:
    """Size of the state over that of the embedding, where neither is zero."""
    norm = _one_view(_before_final_norm(norm))
    first = norm.isel(depth=0, drop=True)
    yield Profile(
        (norm / first.where(first > 0)).where(norm > 0),
        "the size of the states, relative to that at the embedding, is",
    )


@verdict(metric="gradient_norm", limits=Limits(fail=0.0))
def gradient_not_finite(gradient_norm: xr.DataArray) -> Iterable[Profile]:
    """The gradient holds NaN or infinities.

    Lower the loss scale or the learning rate, clip the gradient, and look at the loss itself first.
    """
    absent = gradient_norm["depth"].isin(gradient_norm.attrs.get(schema.WITHOUT_GRADIENT, []))
    yield Profile(
        _not_finite(gradient_norm, "depth").where(~absent),
        "the number of tokens whose gradient is not finite is",
    )


@verdict(metric="composite_gain", limits=Limits(warn=10.0, fail=100.0), not_for=ALTUP)
def gain_explosion(composite_gain: xr.DataArray) -> Iterator[Profile]:
    """The signal explodes through the product of the mixing matrices.

    Constrain H_res (mHC), start it at the identity, lower its learning rate or decay its dynamic part. The
    mHC paper reports about 3000 for an unstable 27B HC and 1.6 for mHC.
    """
    for direction in DIRECTIONS:
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
        reduction = "p99" if "p99" in mixing_gain["reduction"].values else "max"  # statistics keep the latter
        gain = mixing_gain.sel(direction=direction, reduction=reduction, drop=True)
        yield Profile(gain, f"the {direction} gain of one connection ({reduction} over tokens) is")


@verdict(metric="composite_attenuation", limits=Limits(warn=FADED, fail=0.05, above=False), not_for=ALTUP)
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
        # Where no entry is negative, the least singular value is below every sum, and the sum stands.
        faded = weakest.copy(data=np.maximum(weakest.values, least.values))
        cancelled = not (faded < FADED).any()
        yield Profile(
            weakest if cancelled else faded,
            f"the weakest {side} sum of the mixing from the embedding on ({direction}) is",
            ceiling=Severity.INFO if cancelled else Severity.FAIL,
            more=CANCELLED if cancelled else "",
        )


@verdict(metric="backward_gain", limits=Limits(warn=10.0, fail=1000.0))
def exploding_gradient(
    backward_gain: xr.DataArray, residual_norm: xr.DataArray, relative_gradient: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The gradient grows on its way back through the depth.

    Scale branches by 1/√depth, normalise before the branches, clip; check the first blocks' learning rate.
    """
    yield from _gradient_profiles(backward_gain, residual_norm, relative_gradient, growing=True)


@verdict(metric="backward_gain", limits=Limits(warn=0.1, fail=1e-3, above=False))
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

    Branches that normalise their input make the gradient inversely proportional to the state: ‖δ‖·‖x‖, of
    every token where it is known, is what then stays constant. So it does in any network that multiplies the
    state by a factor; but a sum of such branches does not shrink, and does not multiply late in the depth.
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
    summed = bool(norm.isel(depth=-1) <= LATE_GROWTH * norm.isel(depth=norm.sizes["depth"] // 2))
    explained = growing and summed and bool(sensitivity.max() <= 10.0)
    more = (
        "Relative to the size of the state it stays within a factor of 10: it follows the size of the states, "
        "as where every branch normalises its input and is added."
    )
    yield Profile(
        gain,
        "the gradient's norm, relative to that at the last block, is",
        ceiling=Severity.INFO if explained else Severity.FAIL,
        more=more if explained else "",
    )


def _before_final_norm(profile: xr.DataArray) -> xr.DataArray:
    if "site" not in profile.coords:
        return profile
    keep = np.flatnonzero(profile["site"].values != "final")
    return profile.isel(depth=slice(0, int(keep[-1]) + 1)) if len(keep) else profile


def _one_view(profile: xr.DataArray) -> xr.DataArray:
    """The mean over streams, or the root mean square of the streams where the mean is unknown."""
    mean = profile.sel(stream="mean", drop=True)
    if mean.notnull().any() or profile.sizes["stream"] == 1:
        return mean
    return (profile**2).mean("stream") ** 0.5
