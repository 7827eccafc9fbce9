"""Which paths does the signal take? Who reads whom, how many streams are used, how far back connections read."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.depth_paths import DepthPaths, StreamPaths
from depthscope.diagnostics.quantities.mixing_matrices import Mixing, real_tokens, require_finite
from depthscope.diagnostics.quantities.registry import Unavailable, quantity, ratio
from depthscope.diagnostics.quantities.tokens import evenly_spaced

# Tokens of which the effective streams are computed: each takes, at every cut of the depth, a decomposition of a matrix
# as large as the depth. Heuristic: the mean over 64 tokens is known to an eighth of their spread.
TOKENS = 64


@metric(
    symbol=r"\overline{|M_{kj}|}",
    dims="connection other_connection",
    cite="zhu2024hyper",
    basis="invariant",
    null=1.0,  # a plain residual network reads every earlier output once
    estimator="per token in float64, then the mean of the magnitude over tokens",
)
def depth_kernel(depth_paths: DepthPaths, mean_depth_kernel: np.ndarray) -> xr.Variable:
    r"""How much of an earlier output a connection reads, through all mixing between.

    .. math:: M_{kj} = H^{pre}_k \Big(\prod_{t=j+1}^{k-1} H^{res}_t\Big) H^{post\,\top}_j

    ``connection`` is the reader k, ``other_connection`` the source j; 0 for j ≥ k. A plain residual network
    has 1 below the diagonal, one with factors a X + b F their products, and of connections over depth it is their
    weights. Gates are multiplied feature by feature and then averaged; several views of a branch are a root mean square.
    It does not change with the basis of the streams.
    """
    return xr.Variable(("connection", "other_connection"), mean_depth_kernel)


def _equal_share(mixing: Mixing) -> xr.Variable:
    """1/n."""
    return mixing.filled(1.0 / mixing.num_streams)


# Of several streams, which `mixing` tells: one has no shares.
@quantity
def read_sizes(mixing: Mixing, read_weights: np.ndarray) -> xr.Variable:
    """Sum over tokens of the magnitudes of the weights by which each connection reads each stream."""
    return _summed(read_weights)


@quantity
def write_sizes(mixing: Mixing, h_post: xr.DataArray, mask: xr.DataArray) -> xr.Variable:
    """The same of the weights by which it writes."""
    return _summed(require_finite(real_tokens(h_post, mask), h_post))


@metric(
    symbol=r"|H^{pre}_s| / \sum_s |H^{pre}_s|",
    dims="connection stream",
    cite="zhu2024hyper",
    basis="stream",
    null=_equal_share,
    estimator="ratio of sums over tokens",
)
def read_share(read_sizes: xr.Variable) -> xr.Variable:
    """Share of each stream in what a connection reads.

    NaN where H_pre was inferred from streams that are equal, which do not tell it.
    """
    return _shares(read_sizes)


@metric(
    symbol=r"|H^{post}_s| / \sum_s |H^{post}_s|",
    dims="connection stream",
    cite="zhu2024hyper",
    basis="stream",
    null=_equal_share,
    estimator="ratio of sums over tokens",
)
def write_share(write_sizes: xr.Variable) -> xr.Variable:
    """Share of each stream in what a connection writes."""
    return _shares(write_sizes)


@metric(
    symbol=r"\|H^{pre}_s x_s\| / \sum_s \|H^{pre}_s x_s\|",
    dims="connection stream",
    cite=OURS,
    basis="stream",
    null=_equal_share,
    estimator="ratio of sums over tokens",
)
def signal_share(signal_sizes: xr.Variable) -> xr.Variable:
    r"""Share of each stream in the signal that a connection reads: its weight times its size.

    .. math:: \|H^{pre}_s x_s\| \, / \, \textstyle\sum_s \|H^{pre}_s x_s\|

    A stream with a small weight may carry most of what is read, where it is much larger than the others.
    """
    return _shares(signal_sizes)


@quantity
def signal_sizes(
    mixing: Mixing, read_weights: np.ndarray, h_pre: xr.DataArray, residual: xr.DataArray, mask: xr.DataArray
) -> xr.Variable:
    """Sum over tokens of how much of each stream a connection reads, its weight times its size."""
    sizes = _stream_sizes(_read_depths(h_pre, residual), residual, mask)
    return _summed(np.abs(read_weights) * sizes)


def _read_depths(h_pre: xr.DataArray, residual: xr.DataArray) -> list[int]:
    """Position on the depth axis of the state that each connection reads."""
    depths = residual["depth"].values.tolist() if "depth" in residual.coords else []
    if "depth_in" not in h_pre.coords or not set(h_pre["depth_in"].values.tolist()) <= set(depths):
        raise Unavailable(
            "the run does not have the states that the connections read: capture them with sites=None"
        )
    return [depths.index(depth) for depth in h_pre["depth_in"].values.tolist()]


def _stream_sizes(depths: list[int], residual: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """Size of each stream of each real token at some depths, (C, N, n); a depth is read once."""
    real = mask.transpose("sample", "token").values.astype(bool)
    states = residual.transpose("depth", "sample", "token", "stream", "feature")
    sizes = {
        depth: np.linalg.norm(states.variable[depth].values[real].astype(np.float64), axis=-1)
        for depth in sorted(set(depths))
    }
    found = np.stack([sizes[depth] for depth in depths])
    if not np.isfinite(found).all():
        raise Unavailable("some states are not finite, so that what is read of them is not known")
    return found


def _summed(weights: np.ndarray) -> xr.Variable:
    # Summed over tokens before the division: a token that reads little counts little.
    return xr.Variable(("connection", "stream"), np.abs(weights).sum(axis=1))


def _shares(sizes: xr.Variable) -> xr.Variable:
    total = xr.Variable(("connection",), sizes.values.sum(axis=1))
    return ratio(sizes, total)


# Tokens of random gates whose mean is the null of the effective streams: their spread is about 0.2. This project.
DRAWS = 16


def _of_random_gates(depth_paths: DepthPaths) -> xr.Variable:
    """That of streams that do not mix, read with σ(z) and written with 2σ(z) of normal logits z; 1 of one stream."""
    cuts = np.where(np.arange(len(depth_paths)) > 0, 1.0, np.nan)
    if isinstance(depth_paths, StreamPaths):
        cuts[1:] = _streams_of_random_gates(len(depth_paths), depth_paths.mixing.num_streams)
    return xr.Variable(("connection",), cuts)


@lru_cache(maxsize=64)
def _streams_of_random_gates(count: int, num_streams: int) -> np.ndarray:
    """Their effective streams at the cuts between connections, the mean over some draws: about 1.4 of four streams."""
    rng = np.random.default_rng(0)  # the same null for the same size in every analysis
    reads, writes = 1.0 / (1.0 + np.exp(-rng.standard_normal((2, count, DRAWS, num_streams))))
    identity = np.broadcast_to(np.eye(num_streams), (count, DRAWS, num_streams, num_streams))
    return np.asarray(kernel.streams_across(identity, reads, 2.0 * writes)).mean(axis=0)


@metric(
    symbol=r"n_{\mathrm{eff}}",
    dims="connection reduction",
    cite="roy2007effective",
    basis="invariant",
    null=_of_random_gates,
    most_tokens=lambda width: TOKENS,
    estimator=f"per token in float64, over at most {TOKENS} tokens, evenly spaced, then reduced over them",
    headline=True,
    better="higher",
)
def effective_streams(depth_paths: DepthPaths) -> xr.Variable:
    r"""Effective streams: how many independent signals pass from the earlier connections to the later ones.

    .. math:: \exp H(\sigma / \textstyle\sum\sigma) \text{ of } \sigma(M_{k \ge c,\, j < c})

    At the cut before a connection; NaN at the first. At most the number of streams, 1 in a plain residual network, up to the
    number of earlier outputs in connections over depth; it does not change with the basis of the streams. Gates are positive,
    so that even random ones pass little more than one signal: read it against its null.
    """
    # All connections of the same few tokens: a cut depends on the connections at every depth.
    chosen = evenly_spaced(depth_paths.num_tokens, TOKENS)
    return depth_paths.reduced(depth_paths.effective_streams(chosen))
