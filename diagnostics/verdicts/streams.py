"""Do the streams stay different, mix as claimed, and all get used? Verdicts on connections.

Limits are set by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.declaration import Limits, Profile, number, verdict
from depthscope.diagnostics.verdicts.rule import Kind
from depthscope.diagnostics.verdicts.wiring import BOTH_SUMS, DOUBLY, ONE_EXACT_SUM, ONE_SUM, satisfies

COLLAPSED = 0.01
SUM_ERROR = 1e-2
# Of the differences between streams: what is smaller is what rounding leaves of 1.
ROUNDING = 1e-14
DIFFERENT = 0.95  # mean cosine of streams that have parted: 18 degrees
# Mean cosine over all pairs of streams: what is not common to them is 3 % of them. Healthy trained mHC-lite has 0.994.
COPIED = 0.999
# 1 − cosine of streams that differ by 1e-6 of their size, which is 16 roundings of float32: copies that are computed alike do
# not drift further apart, and training parts them by more at once.
DIFFER = 1e-12
EXACT = 1.0 - DIFFER


# An error of single sums alone does no harm: twenty rounds leave some tokens of trained networks with 0.07, whose logits are
# some 8 apart. What the errors of all connections make of the sums of their product does.
@verdict(
    Kind.FRESH,
    metric="doubly_stochastic_violation",
    judges="factor by which a row or column sum of the product of all mixing matrices is off 1",
    formula="max(max Σ P, 1 / min Σ P); p99 and p1 over tokens",
    range="1 or more",
    limits=Limits(info=1.05, warn=1.25, fail=4.0),
)
def sinkhorn_not_converged(
    doubly_stochastic_violation: xr.DataArray,
    composite_gain: xr.DataArray,
    composite_attenuation: xr.DataArray,
    attrs: Mapping[str, Any],
) -> Iterator[Profile]:
    """The mixing matrices are not doubly stochastic: one sum is exact and the other is not.

    More Sinkhorn iterations (mHC takes 20), in float32. A spread of the logits above 30 cannot converge:
    bound them. One exact sum and one bad one is truncation, or a softmax along one axis; two bad ones mean that another
    matrix is applied.
    """
    if not satisfies(attrs, ONE_EXACT_SUM) or "p99" not in doubly_stochastic_violation["reduction"]:
        return
    worst = doubly_stochastic_violation.sel(reduction="p99", kind=["row", "column"], drop=True).max("kind")
    # Iterations and axes are the same at every connection: of free matrices one may have exact rows by chance.
    if not satisfies(attrs, DOUBLY) and worst.median("connection") < SUM_ERROR:
        return
    most = composite_gain.sel(reduction="p99", drop=True).max("direction")
    least = composite_attenuation.sel(reduction="p1", drop=True).min("direction")
    with np.errstate(divide="ignore"):
        factor = xr.apply_ufunc(np.fmax, most, 1.0 / least)
    # Sums that are exact add up to rounding.
    note = f"The worst error of a sum of one connection is {number(float(worst.max()))}."
    yield Profile(factor.where(worst.max() > SUM_ERROR, 1.0), note=note)


# exp and a division cannot give a negative number: 1e-6 allows for float32 sums of a matrix that was recovered from states.
# A tenth is no error of rounding or of a formula any more.
@verdict(
    Kind.FRESH,
    metric="doubly_stochastic_violation",
    judges="size of the most negative entry of a mixing matrix",
    formula="max(0, −min_ij H_ij)",
    limits=Limits(warn=1e-6, fail=0.1),
)
def negative_mixing(doubly_stochastic_violation: xr.DataArray, attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The rows and columns of the mixing matrices sum to 1, but entries are negative.

    exp and normalisation cannot give them: what is applied is not what Sinkhorn returned, unless signed weights are meant.
    """
    # A Sinkhorn that ends on one side leaves the other sum nearly 1.
    sums = doubly_stochastic_violation.sel(kind=["row", "column"], reduction="max").max("kind")
    nearly = satisfies(attrs, ONE_SUM) and bool(sums.median("connection") < SUM_ERROR)
    if satisfies(attrs, BOTH_SUMS) or nearly:
        yield Profile(doubly_stochastic_violation.sel(kind="negativity", reduction="max", drop=True))


@verdict(
    Kind.FRESH,
    metric="relative_deflated_gain",
    judges="share of the first differences between streams that is left, relative to what they have in common",
    formula="σ₁(P on 1⊥) / p; median over tokens",
    limits=Limits(warn=COLLAPSED, above=False),
    follows_from=("constant_mixing",),
)
def stream_collapse(
    relative_deflated_gain: xr.DataArray, stream_cosine: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The mixing makes all streams carry the same signal.

    Start H_res near the identity (a bias on the diagonal of its logits: zero logits mix uniformly), or mix
    less often. The gain does not show it: a uniform matrix has gain 1.
    """
    left = relative_deflated_gain.sel(reduction="median", drop=True)
    before = left.shift(connection=1, fill_value=1.0)
    # What is left after earlier connections may be rounding already, and its ratios mean nothing.
    alone = (left / before).where(np.isfinite(before) & (before > ROUNDING) & (left < np.inf))
    parted = _parted_by_writes(stream_cosine)
    yield Profile(
        left,
        template="{percent} of the initial differences between streams survive {where}",
        metric="relative_deflated_gain",
        begins=True,
        # One connection that makes them the same does so by mistake; that many do together is how published ones begin.
        note_only=bool(parted) or not bool((alone < COLLAPSED).any()),
        note=parted,
    )


def _parted_by_writes(stream_cosine: xr.DataArray | None) -> str:
    """What explains that streams differ although the mixing forgets how they began; empty where they do not differ."""
    if stream_cosine is None:
        return ""
    largest = float(stream_cosine.isel(depth=slice(stream_cosine.sizes["depth"] // 2, None)).max())
    # Streams that begin as copies have no differences to lose.
    if not (1.0 - float(stream_cosine.isel(depth=0)) < DIFFER and largest < DIFFERENT):
        return ""
    return (
        "The streams begin as copies, which have no differences to lose, and what is written to them tells them apart: their "
        f"mean cosine over the later half is {number(largest)} or less."
    )


# Near copies are a note, whatever merging them costs: training has parted them, and what they are worth is the task's. Exact
# ones are no other network than one with a single stream.
@verdict(
    Kind.LOSS,
    metric="stream_cosine",
    judges="mean cosine between streams in the later half, or of the two most alike",
    formula="mean or max over pairs of cos(x_i, x_j)",
    range="−1 to 1",
    limits=Limits(info=COPIED, warn=EXACT, scale="cosine"),
    follows_from=("stream_collapse", "passing_streams"),
)
def copied_streams(
    stream_cosine: xr.DataArray, closest_stream_cosine: xr.DataArray | None = None
) -> Iterator[Profile]:
    """The streams are still copies of one another deep in the network.

    They start as copies and become different only where writes or mixing differ: break the symmetry of H_post or
    H_pre at the start. Normal in a fresh symmetric network; after training it wastes the streams.
    """
    # They are copies at the embedding by construction: only the later half is judged.
    late = np.arange(stream_cosine.sizes["depth"]) >= max(2, stream_cosine.sizes["depth"] // 2)
    judged = stream_cosine.where(xr.DataArray(late, dims="depth"))
    yield Profile(judged, "mean cosine between streams", metric="stream_cosine")
    # Two of several streams: copies that the mean over all pairs hides. The others have parted, so that nothing excuses a pair
    # that has not.
    if closest_stream_cosine is not None and 1.0 - float(judged.max()) > DIFFER:
        two = closest_stream_cosine.where(judged.notnull())
        if bool(two.max() > EXACT):
            words = "cosine of the two streams that are most alike"
            yield Profile(two, words, metric="closest_stream_cosine")


# Of four streams one with 3 % of the signal. The effective number of streams, which cannot be large for two, is no limit.
@verdict(
    Kind.FRESH,
    metric="signal_share",
    judges="mean share of a stream in the signal that is read, or in what is written, over an equal share",
    formula="n · mean_c ‖H_pre,s x_s‖ / Σ_s ‖H_pre,s x_s‖, n · mean_c |H_post,s| / Σ_s |H_post,s|",
    range="0 to n",
    limits=Limits(warn=0.1, above=False),
    follows_from=("constant_mixing",),
)
def unused_stream(
    read_share: xr.DataArray,
    write_share: xr.DataArray | None = None,
    signal_share: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """A stream is hardly read, or hardly written, by any connection.

    What is left of the network has fewer streams: vary the initial read and write weights, check the gradients of H_pre and
    H_post and the norm of each stream before it is read, or use fewer streams.
    """
    # What is read of a stream is its weight times its size; without states, as of weight files, the weight alone.
    kinds = {
        "read weight": read_share,
        "share in the signal that is read": signal_share,
        "write weight": write_share,
    }
    for what, share in kinds.items():
        if share is None:
            continue
        names = [name for name in share["stream"].values.tolist() if name != "mean"]
        for stream in names:
            relative = len(names) * share.sel(stream=stream, drop=True).mean("connection")
            words = f"{what} of stream {stream}, relative to an equal share"
            yield Profile(relative, words, stream=str(stream))
