"""What do the streams cost? Elements that each connection moves, and activations that are saved for the backward."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import memory as kernel
from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.quantities.registry import quantity

BY_FORMULA = "by formula, from the width and the number of streams"


@quantity
def stream_sizes(
    h_res: xr.DataArray, h_pre: xr.DataArray, h_post: xr.DataArray, residual: xr.DataArray
) -> tuple[int, int]:
    """Width d and number n of the streams of a network whose connections read, write and mix them by scalars.

    The weights are needed for this alone: the counts are those of connections that have all three.
    """
    return residual.sizes["feature"], h_res.sizes["stream_in"]


def _along(h_res: xr.DataArray, counts: int | np.ndarray) -> xr.Variable:
    """Counts along the connections."""
    return xr.Variable(("connection",), np.full(h_res.sizes["connection"], counts, dtype=float))


def _moved_by_one_stream(h_res: xr.DataArray, stream_sizes: tuple[int, int]) -> xr.Variable:
    """What a plain residual connection of the same width reads and writes: 3 d."""
    return _along(h_res, kernel.elements_moved(stream_sizes[0], 1))


@metric(
    symbol=r"(4n+2)d + 2n^2 + 4n",
    dims="connection",
    units="element",
    cite="xie2025mhc",
    basis="invariant",
    null=_moved_by_one_stream,
    estimator=BY_FORMULA,
)
def fused_elements_moved(h_res: xr.DataArray, stream_sizes: tuple[int, int]) -> xr.Variable:
    r"""Elements that a connection reads and writes for a token where one kernel writes, mixes and adds.

    .. math:: \underbrace{(3n+1)d + n^2 + 2n}_{read} + \underbrace{(n+1)d + n^2 + 2n}_{written}

    That kernel reads (n + 1) d in place of (3n + 1) d elements, and writes n d in place of 3 n d.
    """
    return _along(h_res, kernel.elements_moved(*stream_sizes, fused=True))


def _kept(h_res: xr.DataArray, width: int, streams: int) -> xr.Variable:
    """So many elements as the streams have, for each connection so far."""
    return _along(
        h_res, np.arange(1, h_res.sizes["connection"] + 1) * kernel.kept_elements(width, streams, 1)
    )


def _kept_by_one_stream(h_res: xr.DataArray, stream_sizes: tuple[int, int]) -> xr.Variable:
    """The same of one stream."""
    return _kept(h_res, stream_sizes[0], 1)


@metric(
    symbol=r"n d (k + 1)",
    dims="connection",
    units="element",
    cite="xie2025mhc",
    basis="invariant",
    null=_kept_by_one_stream,
    estimator=BY_FORMULA,
)
def kept_elements(h_res: xr.DataArray, stream_sizes: tuple[int, int]) -> xr.Variable:
    r"""Elements of the streams that are saved for the backward, for a token, from the first connection through this one.

    .. math:: n\,d\,(k+1)

    Without recomputation; the null is a plain residual's, d (k + 1). Recomputed in blocks of
    :math:`L_r^* = \sqrt{nL/(n+2)}` sublayers, :math:`n d \lceil L/L_r \rceil + (n+2) d L_r` are kept in all.
    """
    return _kept(h_res, *stream_sizes)
