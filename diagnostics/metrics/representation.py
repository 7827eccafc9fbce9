"""Do two depths hold the same in all of a state? CKA of all streams joined, of each one, without large features.

CKA of the mean over streams is blind to what differs between streams, and a few large features or directions may be all
that it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import similarity as kernel
from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States, by_kind
from depthscope.diagnostics.quantities.tokens import evenly_spaced

# Tokens compared: the debiased CKA of unrelated states then has a standard deviation of √2/256. Heuristic.
ROWS = 256
# A feature is large where its deviation over tokens is so many times that of the median feature, and at most this share of
# the features is: more are no outliers. Heuristics of ours; the outliers of trained models are one to ten features
# (Timkey & van Schijndel 2021, Sun et al. 2024).
LARGE, MOST_LARGE = 10.0, 0.1

# States of one depth, streams apart (n, N, d), in; what is compared of them, (…, N, f), out.
View = Callable[[np.ndarray], np.ndarray]


class Views:
    """What of the states is compared between depths, one depth in memory at a time.

    ``states``: the states.
    ``masks``: dims (tokens, sample, token): which tokens count, by kind.
    """

    def __init__(self, states: States, masks: xr.Variable) -> None:
        self._states = states
        self._known: dict[View, xr.Variable] = {}
        self._kinds = masks.transpose("tokens", "sample", "token").values & states.mask

    def compare(self, view: View) -> xr.Variable:
        """The least unbiased CKA of a view's parts, of every depth with every other.

        ``view``: states of one depth (n, N, d) in, parts (P, N, f) out.
        Returns: Dims (tokens, depth, other_depth); NaN where a state is not finite.
        """
        # Of a single stream the joined streams are the stream itself.
        view = joined if view is each_stream and self._states.num_streams == 1 else view
        if view not in self._known:
            finite = np.asarray(self._states.finite_streams.all(axis=1))
            tables = np.stack(by_kind(self._kinds, partial(self._table, view)))
            found = np.where(finite[:, None] & finite[None, :], tables, np.nan)
            self._known[view] = xr.Variable(("tokens", "depth", "other_depth"), found)
        return self._known[view].copy()

    def _table(self, view: View, counted: np.ndarray) -> np.ndarray:
        depths = len(self._states)
        chosen = np.argwhere(counted)
        chosen = chosen[evenly_spaced(len(chosen), ROWS)]
        if not len(chosen):
            return np.full((depths, depths), np.nan)
        sample, token = chosen.T
        parts = []
        for depth in range(depths):
            streams = self._states.load(depth)[0][-self._states.num_streams :, sample, token]
            parts.append(view(streams.astype(np.float64)))
        # (P, L, N, f): each part with itself at every other depth.
        tables = [kernel.cka_matrix(np.stack(part), unbiased=True) for part in zip(*parts, strict=True)]
        return np.min(tables, axis=0)


@quantity
def state_views(residual_states: States, token_masks: xr.Variable) -> Views:
    """The states in the views that are compared between depths."""
    return Views(residual_states, token_masks)


def joined(streams: np.ndarray) -> np.ndarray:
    """All streams of a token as one vector of n·d features, (1, N, n·d)."""
    return np.moveaxis(streams, 0, 1).reshape(1, streams.shape[1], -1)


def each_stream(streams: np.ndarray) -> np.ndarray:
    """Every stream by itself, (n, N, d)."""
    return streams


def without_large_features(streams: np.ndarray) -> np.ndarray:
    """The mean over streams with its large features set to zero, (1, N, d).

    Examples
    --------
    >>> states = np.random.default_rng(0).normal(size=(1, 50, 20))
    >>> states[..., 3] *= 1000
    >>> np.flatnonzero(without_large_features(states)[0, 0] == 0).tolist()
    [3]
    """
    mean = streams.mean(axis=0)
    deviation = mean.std(axis=0)
    largest = np.argsort(deviation)[::-1][: max(1, int(MOST_LARGE * len(deviation)))]
    large = largest[deviation[largest] > LARGE * np.median(deviation)]
    return np.where(np.isin(np.arange(len(deviation)), large), 0.0, mean)[None]


_declared = partial(
    metric,
    dims="tokens depth other_depth",
    null=0.0,
    most_tokens=lambda width: ROWS,
)
SAMPLED = f"unbiased HSIC₁; over at most {ROWS} tokens, evenly spaced"


@_declared(
    basis="stream",
    symbol=r"\mathrm{CKA}_{n d}",
    label="CKA of joined streams",
    cite="kornblith2019similarity",
    estimator=SAMPLED,
)
def joined_cka(state_views: Views) -> xr.Variable:
    """Linear CKA between depths of all streams joined: the state of n·d features, not its mean over streams."""
    return state_views.compare(joined)


@_declared(
    basis="stream",
    symbol=r"\min_i \mathrm{CKA}(x_i)",
    label="CKA of the least similar stream",
    cite="kornblith2019similarity",
    estimator=SAMPLED,
)
def least_stream_cka(state_views: Views) -> xr.Variable:
    """Linear CKA between depths of that stream which is least similar to itself at the other depth."""
    return state_views.compare(each_stream)


@_declared(
    basis="feature",  # which features are large depends on it
    symbol=r"\mathrm{CKA}_{-}",
    label="CKA without large features",
    cite="timkey2021all",
    estimator=SAMPLED,
)
def trimmed_cka(state_views: Views) -> xr.Variable:
    """Linear CKA between depths without the few features that are 10 times as large as the median one.

    Such features may be all that the CKA of full states sees.
    """
    return state_views.compare(without_large_features)
