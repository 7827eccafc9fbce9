"""Does the signal explode, fade or stop being a number? Verdicts on states, gradients and gains.

Limits without a comment or a source are heuristics of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.gradients import NUM_FEATURES
from depthscope.diagnostics.metrics.mixing import LARGEST_TOKEN
from depthscope.diagnostics.schema import CUT_GRADIENT, NOT_FINITE, WITHOUT_GRADIENT
from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, number, verdict
from depthscope.diagnostics.verdicts.locations import place
from depthscope.diagnostics.verdicts.rule import Kind
from depthscope.diagnostics.verdicts.wiring import ONE_EXACT_SUM, satisfies

ROUNDED = 1e-6  # of a sum and a singular value that are the same
# A stream with less than half of its sum left counts as faded. Heuristic.
FADED = 0.5


def _not_finite(values: xr.DataArray, axis: str) -> xr.DataArray:
    """How many tokens are not finite at each position of an axis; 1 where that was not counted."""
    if "stream" in values.dims:
        # Training curves have no mean over streams: of several, only the streams themselves count.
        values = values.sel(stream=[s for s in values["stream"].values.tolist() if s != "mean"] or ["mean"])
    missing = values.isnull().any([dim for dim in values.dims if dim != axis]).astype(float)
    counts = values.attrs.get(NOT_FINITE, {})
    numbers = [float(counts.get(str(position), 1.0)) for position in missing[axis].values]
    return missing.copy(data=np.array(numbers)).where(missing > 0, 0.0)


@verdict(
    Kind.FACT,
    metric="residual_norm",
    judges="number of tokens whose state, mixing matrix or gradient is not finite, or of losses",
    limits=Limits(fail=0.0),
)
def not_finite(
    residual_norm: xr.DataArray | None = None,
    mixing_gain: xr.DataArray | None = None,
    gradient_norm: xr.DataArray | None = None,
    loss_not_finite: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """Something is NaN or infinite: states, mixing matrices, gradients or the loss.

    Look at the first place: overflow in half precision, a division by zero in a norm, exploded weights, labels that are all
    ignored. Rerun that block in float32, lower the learning rate or the loss scale, and go back to a checkpoint from before.
    """
    states = None if residual_norm is None else _not_finite(residual_norm, "depth")
    mixing = None if mixing_gain is None else _unknown_mixing(mixing_gain, states)
    kinds = [("state", states), ("mixing matrix", mixing)]
    # A matrix that is not finite leaves no finite state behind it: the first place is named first.
    if mixing is not None and states is not None and _first(mixing) < _first(states):
        kinds.reverse()
    if gradient_norm is not None:
        absent = gradient_norm["depth"].isin(gradient_norm.attrs.get(WITHOUT_GRADIENT, []))
        kinds.append(("gradient", _not_finite(gradient_norm, "depth").where(~absent)))
    for kind, values in kinds:
        if values is not None:
            yield Profile(values, f"number of tokens whose {kind} is not finite", begins=True)
    if loss_not_finite is not None:
        yield Profile(loss_not_finite, "number of losses that are not finite")


def _first(values: xr.DataArray) -> float:
    beyond = np.flatnonzero(values.values > 0)
    return float(beyond[0]) if len(beyond) else np.inf


def _unknown_mixing(mixing_gain: xr.DataArray, states: xr.DataArray | None) -> xr.DataArray | None:
    """Where mixing matrices are not finite; None where they were not read."""
    gain = mixing_gain.sel(reduction="mean")  # training curves have no quantiles
    # A matrix that is not finite leaves no finite state behind it. So gains that are missing beside finite states are of
    # matrices that were not read in that step; where no state is known, so are gains that are missing at every connection.
    unread = gain.isnull().all() if states is None else not (states > 0).any()
    if NOT_FINITE not in mixing_gain.attrs and bool(gain.isnull().any() and unread):
        return None
    return _not_finite(gain, "connection")


@verdict(
    Kind.FACT,
    metric="residual_norm",
    judges="number of depths at which the state is zero",
    limits=Limits(fail=0.0),
)
def dead_state(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """The state is zero: nothing is passed on.

    Look at the block before the first such depth: a branch or a skip that is multiplied by zero, a ReLU that no
    token passes, or values that half precision rounds to zero.
    """
    norm = one_view(residual_norm)
    yield Profile((norm == 0).astype(float).where(norm.notnull()), template="the state is zero {where}")


# Heuristic: a hundred independent unit branches grow by 10 and agreeing ones by 100, so that 1e4 leaves room for a small
# embedding. Beyond 1e8 the sum no longer resolves the embedding in float32, whose spacing is 1.2e-7.
@verdict(
    Kind.FRESH,
    metric="residual_norm",
    judges="size of the state over that at the embedding",
    formula="rms ‖x_l‖ / rms ‖x_0‖",
    limits=Limits(warn=1e4, fail=1e8),
)
def exploding_state(residual_norm: xr.DataArray, attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The state grows by orders of magnitude through the depth.

    Scale branches by 1/√depth, normalise their input, or look for a skip that multiplies by more than 1.
    """
    yield from _relative_size(residual_norm, float(attrs.get(SCALE_BEFORE, 1.0)))


# The inverse of those of an exploding state.
@verdict(
    Kind.FRESH,
    metric="residual_norm",
    judges="size of the state over that at the embedding",
    formula="rms ‖x_l‖ / rms ‖x_0‖",
    limits=Limits(warn=1e-4, fail=1e-8, above=False),
)
def vanishing_state(residual_norm: xr.DataArray, attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The state shrinks towards zero through the depth.

    Keep the skip path at full strength, or raise the initial scale of layers without one.
    """
    yield from _relative_size(residual_norm, float(attrs.get(SCALE_BEFORE, 1.0)))


SCALE_BEFORE = "scale_before"
"""Attribute that `judge` gives a later stage: the size of its first state over that at the embedding, per feature."""


def _relative_size(norm: xr.DataArray, before: float) -> Iterator[Profile]:
    """Size of the state over that of the embedding, where neither is zero (see `dead_state`)."""
    norm = one_view(_before_final_norm(norm))
    first = norm.isel(depth=0, drop=True)
    yield Profile((before * norm / first.where(first > 0)).where(norm > 0))


@verdict(
    Kind.FACT,
    metric="gradient_norm",
    judges="number of states that no gradient reaches below a cut",
    limits=Limits(fail=0.0),
)
def cut_gradient(gradient_norm: xr.DataArray) -> Iterator[Profile]:
    """A block stops the gradient: nothing below it is trained.

    Look in that block for a detach, a no_grad, an argmax or a rounding on the way from its input to its output, the skip
    included. Where it is meant, as a frozen lower part is, freeze those weights: then no gradient is expected there.
    """
    cut, without = (gradient_norm.attrs.get(name, []) for name in (CUT_GRADIENT, WITHOUT_GRADIENT))
    lost, sentence = (
        gradient_norm.isel(stream=0, drop=True).copy(data=np.zeros(gradient_norm.sizes["depth"])),
        "",
    )
    if cut:
        depths = gradient_norm["depth"].values.tolist()
        # A state that is detached has no graph: the cut is above the last state in a row that no gradient reached.
        top = depths.index(max(cut))
        while top + 1 < len(depths) and depths[top + 1] in without:
            top += 1
        lost[depths.index(min(cut)) : top + 1] = 1.0
        sentence = (
            f"No gradient reaches the {int(lost.sum())} states up to the one {place(lost, top)}, where every state should get "
            f"one ({DEFAULT})."
        )
    yield Profile(lost, sentence=sentence)


# Between the 1.6 of mHC and the 3000 of an unstable HC that the mHC paper reports, of gains averaged over tokens; so for one
# connection.
@verdict(
    Kind.FRESH,
    metric="composite_gain",
    judges="gain of the product of all mixing matrices, forward or backward, or its norm",
    formula="max_i |Σ_j P_ij|, max_j |Σ_i P_ij|, ‖P‖₂; p99 over tokens",
    limits=Limits(warn=10.0, fail=100.0),
    follows_from=("constant_mixing",),
)
def gain_explosion(
    composite_gain: xr.DataArray, composite_operator_gain: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The signal explodes through the product of the mixing matrices.

    Constrain H_res (mHC), start it at the identity, lower its learning rate or decay its dynamic part. The
    mHC paper reports about 3000 for an unstable 27B HC and 1.6 for mHC.
    """
    amplifies = False
    for at, direction in enumerate(("forward", "backward")):
        values, tokens, note = _of_tokens(composite_gain.sel(direction=direction, drop=True), at)
        amplifies |= bool((values > GAIN_LIMIT).any())
        words = f"{direction} gain of the mixing from the embedding on ({tokens})"
        yield Profile(values, words, note=note, metric="composite_gain")
    # Differences between streams may grow while all signed sums stay 1: the norm sees both.
    if composite_operator_gain is not None:
        two = composite_operator_gain["norm"].values.tolist().index("two")
        values, tokens, note = _of_tokens(composite_operator_gain.isel(norm=two, drop=True), two)
        words = f"spectral norm of the mixing from the embedding on, which also sees what signed sums cancel ({tokens})"
        yield Profile(values.where(not amplifies), words, note=note, metric="composite_operator_gain")


GAIN_LIMIT = 10.0
TOKEN_LIMIT = 100.0  # of a single token, since the largest of many is larger than that of few


def _of_tokens(gain: xr.DataArray, kind: int) -> tuple[xr.DataArray, str, str]:
    """The 99th percentile over tokens, or the largest token where it alone is beyond the limit; in words, with its place."""
    largest = gain.sel(reduction="max", drop=True)
    # Training curves have no quantiles, which sums cannot give.
    if "p99" not in gain["reduction"].values:
        return largest, "max over tokens", ""
    most = gain.sel(reduction="p99", drop=True)
    if bool((most > GAIN_LIMIT).any()) or not bool((largest > TOKEN_LIMIT).any()):
        return most, "p99 over tokens", ""
    tokens, at = gain.attrs.get(LARGEST_TOKEN), int(np.nanargmax(largest.values))
    note = ""
    if tokens:
        sequence, position = tokens[kind][at]
        typical = number(float(gain.sel(reduction="median").isel(connection=at)))
        note = f"It is that of sequence {sequence}, position {position}; the median over tokens is {typical}."
    return largest, "of the token with the largest one", note


@verdict(
    Kind.FRESH,
    metric="composite_attenuation",
    judges="weakest row or column sum of the product of all mixing matrices; of free matrices over what these may leave",
    formula="min_i |Σ_j P_ij|, min_j |Σ_i P_ij|; p1 over tokens",
    limits=Limits(warn=FADED, fail=0.05, above=False),
    follows_from=("sinkhorn_not_converged",),
)
def attenuation(
    composite_attenuation: xr.DataArray, composite_singular_value: xr.DataArray, attrs: Mapping[str, Any]
) -> Iterator[Profile]:
    """A stream fades through the product of the mixing matrices; the largest gain hides it.

    Backward: more Sinkhorn iterations, or end them on columns; all error of stopping early sits in one of the
    two sums. Forward: some stream is no longer fed; look at its row of H_res.
    """
    # A sum of matrices without a constraint is around 1 by nothing but training: 0.3 over 12 connections is what free matrices
    # do, and a state fades by the root of the depth beside what is added to it, as in any Pre-LN stack.
    is_free = not satisfies(attrs, ONE_EXACT_SUM)
    expected = min(0.1, composite_attenuation.sizes["connection"] ** -0.5) / FADED if is_free else 1.0
    beside = f", relative to the {number(expected)} that free matrices may well leave" if is_free else ""
    least = composite_singular_value.isel(component=-1, drop=True).sel(reduction="p1", drop=True)
    for direction, side in (("forward", "row"), ("backward", "column")):
        weakest = composite_attenuation.sel(direction=direction, reduction="p1", drop=True)
        # Signed entries can cancel in a sum although no stream fades: then the smallest singular value is larger, and the sum
        # means nothing. Where no entry is negative it is below every sum.
        yield Profile(
            weakest.where(weakest.values >= (1.0 - ROUNDED) * least.values) / expected,
            f"weakest {side} sum of the mixing from the embedding on ({direction}){beside}",
            metric="" if is_free else "composite_attenuation",
        )


# Deep networks without norms begin with 10 to 20 at the embedding, and train. The gradient alone is 10 to 120 times as large
# at the embedding of a healthy Pre-LN network as at its end, whose states are as much larger: a number, no finding.
@verdict(
    Kind.FRESH,
    metric="relative_gradient",
    judges="gradient times size of the state, over that at the last block",
    formula="√Σ ‖∂L/∂x_l‖² ‖x_l‖², over that of the last l",
    limits=Limits(warn=30.0, fail=1000.0),
    follows_from=("gain_explosion",),
)
def exploding_gradient(relative_gradient: xr.DataArray) -> Iterator[Profile]:
    """The gradient grows on its way back through the depth, more than the states shrink.

    Scale branches by 1/√depth, normalise before the branches, clip; check the first blocks' learning rate.
    """
    if relative_gradient.sizes["depth"] > 1:
        yield Profile(_over_the_last(relative_gradient))


@verdict(
    Kind.FRESH,
    metric="gradient_norm",
    judges="gradient, alone or times the size of the state where that is more, over that at the last block",
    formula="max(‖∂L/∂x_l‖, ‖∂L/∂x_l‖ ‖x_l‖), each over that of the last l; times the depths where their mean is read",
    limits=Limits(warn=0.1, fail=1e-3, above=False),
)
def vanishing_gradient(
    gradient_norm: xr.DataArray, relative_gradient: xr.DataArray, attrs: Mapping[str, Any]
) -> Iterator[Profile]:
    """The gradient vanishes on its way back through the depth.

    Check that the skip path is unbroken and not scaled down, and that no norm sits on it; raise the branches'
    initial scale in the early blocks.
    """
    alone, relative = _over_the_last(gradient_norm), _over_the_last(relative_gradient)
    if alone.sizes["depth"] < 2:
        return
    # A state that only a weighted mean over all depths reads gets its share of the gradient.
    share = alone.sizes["depth"] if str(attrs.get("family", "")).startswith("depth_") else 1
    # Both must be small: of states that shrink with depth the gradient is smaller where they are larger, and loses nothing.
    kept = xr.where(relative > alone, relative, alone, keep_attrs=False).assign_coords(alone.coords)
    # Where a block before gets more, the gradient has passed this state by: it is lost on no way back. An embedding that later
    # blocks read too gets its own.
    kept[1:] = np.fmax.accumulate(kept.values[1:])
    yield Profile(share * kept)


def _over_the_last(profile: xr.DataArray) -> xr.DataArray:
    values = one_view(_before_final_norm(profile))
    return values / values.isel(depth=-1, drop=True).where(lambda last: last > 0)


def _before_final_norm(profile: xr.DataArray) -> xr.DataArray:
    if "site" not in profile.coords:
        return profile
    # The final norm resets the size, so that what comes before it would look as if it exploded or faded.
    before = np.flatnonzero(profile["site"].values != "final")
    return profile.isel(depth=slice(0, int(before[-1]) + 1)) if len(before) else profile


def one_view(profile: xr.DataArray) -> xr.DataArray:
    """The root mean square over streams: their mean may cancel, as that of gradients below a head with signs does."""
    streams = [stream for stream in profile["stream"].values.tolist() if stream != "mean"]
    if not streams:
        return profile.sel(stream="mean", drop=True)
    return (profile.sel(stream=streams) ** 2).mean("stream", skipna=False) ** 0.5


# --- stages of one chain, which are joined and not judged alone ---

# As the capture names the stages of one chain, whose states have other widths or numbers of tokens.
_STAGE = re.compile(r"(?P<chain>.*?)_?stage(?P<number>\d+)$")


def with_joined_stages(analyses: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Analyses of which each later stage of a chain has the attribute ``scale_before``.

    ``analyses``: by the name of the chain or stage.
    """
    found = dict(analyses)
    first: dict[str, float] = {}
    for name, analysis in analyses.items():
        stage = _STAGE.match(name)
        size = _size_of_a_feature(analysis)
        if stage is None or size is None:
            continue
        if stage["number"] == "0":
            first[stage["chain"]] = size
        elif first.get(stage["chain"], 0.0) > 0:
            found[name] = analysis.assign_attrs({SCALE_BEFORE: size / first[stage["chain"]]})
    return found


def _size_of_a_feature(analysis: xr.Dataset) -> float | None:
    """Root mean square of a feature of the first state, which does not change with the width; None where unknown."""
    if "residual_norm" not in analysis or NUM_FEATURES not in analysis["residual_norm"].attrs:
        return None
    norm = analysis["residual_norm"]
    first = norm.isel(step=-1) if "step" in norm.dims else norm
    return float(one_view(first.isel(depth=0))) / float(norm.attrs[NUM_FEATURES]) ** 0.5
