"""Is every stream read, written and of a size like the others'? Verdicts on single streams.

Limits without a comment or a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.calibration import DEFAULT, NOT_CONTRADICTED
from depthscope.diagnostics.verdicts.causes import anywhere
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, verdict


def _of_streams(values: xr.DataArray) -> xr.DataArray:
    return values.sel(stream=[stream for stream in values["stream"].values.tolist() if stream != "mean"])


def _mean_shares(share: xr.DataArray) -> xr.DataArray:
    """Share of each stream over all connections."""
    return _of_streams(share).mean("connection")


def _unused_streams(share: xr.DataArray, verb: str) -> Iterator[Profile]:
    shares = _mean_shares(share)
    for stream in shares["stream"].values.tolist():
        relative = shares.sel(stream=stream, drop=True) * shares.sizes["stream"]
        words = f"the {verb} weight of stream {stream}, relative to an equal share, is"
        yield Profile(relative, words, stream=str(stream))


@verdict(
    metric="read_share",
    judges=Number(
        "mean read weight of a stream over an equal share", "n · mean_c |H_pre,s| / Σ_s |H_pre,s|", "0 to n"
    ),
    limits=Limits(warn=0.1, above=False, source=NOT_CONTRADICTED),
    follows_from={"dominant_stream": anywhere},
    before_training=True,
)
def unread_stream(read_share: xr.DataArray) -> Iterator[Profile]:
    """A stream is hardly read by any connection.

    Fewer streams would do, or a start that reads them all; check the gradient of H_pre.
    """
    yield from _unused_streams(read_share, "read")


@verdict(
    metric="write_share",
    judges=Number(
        "mean write weight of a stream over an equal share",
        "n · mean_c |H_post,s| / Σ_s |H_post,s|",
        "0 to n",
    ),
    limits=Limits(warn=0.1, above=False, source=NOT_CONTRADICTED),
)
def unwritten_stream(write_share: xr.DataArray) -> Iterator[Profile]:
    """A stream is hardly written by any connection.

    Fewer streams would do, or a start that writes to them all; check the gradient of H_post.
    """
    yield from _unused_streams(write_share, "write")


# Of four streams the others then give 3 % each. The effective number of streams, which cannot be large for two, is no limit.
@verdict(
    metric="signal_share",
    judges=Number(
        "largest mean share of one stream in the signal that the connections read",
        "max_s mean_c ‖H_pre,s x_s‖ / Σ_s ‖H_pre,s x_s‖",
        "1/n to 1",
    ),
    limits=Limits(warn=0.9, source=NOT_CONTRADICTED),
    follows_from={"loud_stream": anywhere},
)
def dominant_stream(read_share: xr.DataArray, signal_share: xr.DataArray | None = None) -> Iterator[Profile]:
    """One stream carries nearly all that the connections read.

    The network is then a plain residual one with spare streams: vary the initial read weights, or use fewer.
    """
    # What is read of a stream is its weight times its size; without states, as of weight files, the weight alone.
    shares = _mean_shares(read_share if signal_share is None else signal_share)
    if shares.isnull().any():
        return
    top = int(np.argmax(shares.values))
    name = str(shares["stream"].values[top])
    what = (
        "weights by which the connections read"
        if signal_share is None
        else "signal that the connections read"
    )
    yield Profile(
        shares.isel(stream=top, drop=True), f"the share of stream {name} in the {what} is", stream=name
    )


# Streams of which each gets its writes in turn differ by the root of the depth, about 10 for a hundred connections.
@verdict(
    metric="residual_norm",
    judges=Number(
        "size of the largest stream over the median of the others",
        "max_s ‖x_s‖ / median of the other ‖x_s‖",
        "1 or more",
    ),
    limits=Limits(warn=20.0, fail=1000.0, source=NOT_CONTRADICTED),
)
def loud_stream(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """One stream is much larger than the others.

    What is read from the streams, or averaged over them, is then that stream alone. Look at what is written to it, and at the
    row of H_res that feeds it; a norm of each stream before it is read keeps them alike.
    """
    sizes = _of_streams(residual_norm).transpose("depth", "stream")
    if sizes.sizes["stream"] < 2:
        return
    if "site" in sizes.coords:
        sizes = sizes.isel(depth=np.flatnonzero(sizes["site"].values.astype(object).astype(str) != "final"))
    ranked = np.sort(sizes.values, axis=1)
    # Beside the median of the others: of two streams, the other one.
    loudest, others = ranked[:, -1], np.median(ranked[:, :-1], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = loudest / others  # infinite where the others are zero, undefined where all are
    # Streams may begin as zeros, which the first connections fill.
    values[:1] = np.where(others[:1] > 0, values[:1], np.nan)
    ratio = sizes.isel(stream=0, drop=True).copy(data=values)
    if ratio.isnull().all():
        return
    at = int(np.nanargmax(values))
    name = str(sizes["stream"].values[int(np.argmax(sizes.values[at]))])
    words = f"the size of stream {name}, relative to the median of the others, is"
    note = "" if np.isfinite(values[at]) else "The median of the others is zero."
    yield Profile(ratio, words, stream=name, note=note)


@verdict(
    metric="residual_norm",
    judges=Number(
        "number of depths in the later half at which a stream is exactly zero and others are not",
        range="0 or more",
    ),
    limits=Limits(warn=0.0),
    follows_from={"dead_state": anywhere},
)
def silent_stream(residual_norm: xr.DataArray) -> Iterator[Profile]:
    """A stream is exactly zero while the others are not.

    Look at its row of H_res and its weight of H_post, which are zero, or at a mask that leaves it out.
    """
    sizes = _of_streams(residual_norm).transpose("depth", "stream")
    if sizes.sizes["stream"] < 2:
        return
    # Streams may begin as zeros, which the connections fill.
    late = np.arange(sizes.sizes["depth"])[:, None] > sizes.sizes["depth"] // 2
    zero = (sizes == 0) & (sizes.max("stream") > 0) & late
    for name in sizes["stream"].values.tolist():
        of_one = zero.sel(stream=name, drop=True)
        where, sentence = np.flatnonzero(of_one.values), ""
        if len(where):
            sentence = f"Stream {name} is exactly zero from depth {where[0]} on; any size above 0 is expected ({DEFAULT})."
        yield Profile(
            of_one.astype(float),
            f"the number of depths at which stream {name} is zero is",
            stream=name,
            sentence=sentence,
        )
