"""Which quantities of a step are of the sampled tokens? Those that compare tokens, or the depths of a token.

The sampled tokens are a trace of one sequence, from which quantities follow as from any other. Each function supplies what a
trace of them alone does not say, by the name of the quantity, see `Quantities`.
Shapes: L depth, K sampled token, V view of the streams (their mean, then each of several), N stream, D feature, C connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.quantities.mixing_matrices import ONE_STREAM
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import STATE
from depthscope.probes.statistics.live_sums import with_mean
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.training.live.exact_quantities import NOT_SHOWN, PROFILE, LiveGroup

# Pooled: the sampled tokens are of many sequences. And as they are few, a biased CKA would be that of noise.
CHOSEN = {"scope": "data", "estimator": "unbiased"}
# The absolute and the relative size of a massive activation, as in `kernels.geometry.massive_activations`.
ABSOLUTE, RELATIVE = 100.0, 1000.0

SAMPLED_QUANTITIES = ("residual", "mask", "massive", "token_norms", "gradient_token_norms", "signal_sizes")
COEFFICIENTS = ("h_res", "h_pre", "h_post")


def sampled(count: int, how: str = "") -> str:
    """The estimator of what is computed on K tokens of a step.

    Examples
    --------
    >>> sampled(128)
    'on 128 sampled tokens of the step'
    """
    return f"on {count} sampled tokens of the step{f'; {how}' if how else ''}"


class SampledTokens:
    """The sampled tokens of one group in one step.

    ``sums``: of the step, of the chain of the group.
    ``group``: which depths and connections.
    ``each_stream``: whether ranks are of each of several streams too, which costs as much again for each, and not of
    their mean alone.
    """

    def __init__(self, sums: TokenSums, group: LiveGroup, *, each_stream: bool) -> None:
        assert sums.live is not None
        self._sums, self._live, self._group, self._each_stream = sums, sums.live, group, each_stream
        real, count = self._live.places[group.depths[0]].real_K, len(self._live.states[group.depths[0]])
        self.real = np.ones(count, dtype=bool) if real is None else real.cpu().numpy()
        # (K, N, D) by depth.
        self.states = [self._of_real(self._live.states[depth]) for depth in group.depths]
        self.count, self._num_streams = self.states[0].shape[:2]
        sizes = [_token_sizes(states_KND) for states_KND in self.states]
        self._mean_LKD, self._norms_LKV, self._medians_LV = (
            np.stack(parts) for parts in zip(*sizes, strict=True)
        )
        self.massive_K = self._massive_tokens()

    def _of_real(self, values_K: torch.Tensor) -> np.ndarray:
        values = values_K.cpu().numpy()
        return values if self.real.all() else values[self.real]

    def source(self, exact: Mapping[str, Callable[[], Any]]) -> Quantities:
        """The quantities of the step; ``exact``: those that are known of every token."""
        supplied = {name: getattr(self, name) for name in SAMPLED_QUANTITIES}
        supplied |= {name: partial(self._coefficient, name) for name in COEFFICIENTS}
        return Quantities(self._group.facts, choices=CHOSEN, supplied={**supplied, **exact})

    # --- as a trace that has the sampled tokens as one sequence ---

    def residual(self) -> xr.DataArray:
        """States of every stream, or the mean over them."""
        states_LKND = np.stack(self.states) if self._each_stream else self._mean_LKD[:, :, None]
        coords = {**self._group.depth_coords, "stream": np.arange(states_LKND.shape[2])}
        return xr.DataArray(states_LKND[:, None], coords, STATE, "residual")

    def mask(self) -> xr.DataArray:
        """All of them are real."""
        return xr.DataArray(np.ones((1, self.count), dtype=bool), dims=("sample", "token"), name="mask")

    def _coefficient(self, name: str) -> xr.DataArray:
        """Mixing matrices, read or write weights as the model applies them."""
        dims, values = self._known(name)
        return xr.DataArray(values, self._group.connection_coords, dims, name)

    # --- which tokens ---

    def _massive_tokens(self) -> np.ndarray:
        """Which tokens have a massive activation at any depth."""
        found = np.zeros(self.count, dtype=bool)
        limits = np.maximum(ABSOLUTE, RELATIVE * self._medians_LV)
        # The largest magnitude of every token, (L, V), at least that of the sampled ones.
        largest = torch.stack([self._live.values["largest"][depth].amax(0) for depth in self._group.depths])
        for depth, view in np.argwhere(largest.cpu().double().numpy() > limits):  # none in most networks
            sizes = np.abs(with_mean(torch.from_numpy(self.states[depth])).numpy()[:, view])
            if np.isfinite(sizes).all():
                found |= (sizes > limits[depth, view]).any(axis=1)
        return found

    def massive(self) -> Massive:
        """Sizes of every token over medians of the sampled ones, and which of these are massive."""
        estimator = {"estimator": f"largest activation of every token; median {sampled(self.count)}"}
        fractions, ratios = [], []
        for depth, median_V in zip(self._group.depths, self._medians_LV, strict=True):
            values_tV = self._live.values["largest"][depth].cpu().numpy().astype(np.float64)
            massive = (values_tV > ABSOLUTE) & (values_tV > RELATIVE * median_V)
            undefined = np.where(np.isnan(values_tV).any(axis=0), np.nan, 0.0)
            count = float(self._sums.sums["token_count"][depth])
            fractions.append(massive.sum(axis=0) / count + undefined)
            ratios.append(values_tV.max(axis=0) / median_V)
        return Massive(
            # Of every stream, also where only their mean is measured.
            token=xr.Variable(("sample", "token"), self.massive_K[None]),
            fraction=xr.Variable(PROFILE, np.array(fractions), estimator),
            ratio=xr.Variable(PROFILE, np.array(ratios), estimator),
            features=(),
            tokens_per_sequence=float(self.count),
        )

    # --- gradients ---

    def token_norms(self) -> np.ndarray:
        """Norms of the states."""
        return np.moveaxis(self._norms_LKV, 1, 2)

    def gradient_token_norms(self) -> np.ndarray:
        """Norms of the gradients."""
        known = [self._live.gradient_norms.get(depth) for depth in self._group.depths]
        if all(norm is None for norm in known):
            raise Unavailable(NOT_SHOWN)
        found = np.full((len(known), len(self._group.streams), self.count), np.nan)
        for at, norm in enumerate(known):
            if norm is not None:
                found[at] = self._of_real(norm).T
        return found

    # --- connections ---

    @cached_property
    def _coefficients(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """The coefficients of the connections at the sampled tokens, as a trace has them."""
        group = self._group
        if not group.connections:
            return {}
        found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        route = ("connection", "sample", "token")
        mixes = self._of_connections(self._live.mixes)
        if mixes is not None:
            found["h_res"] = ((*route, "stream_out", "stream_in"), self._stacked(mixes))
        for name, parts, axis in (("h_pre", self._live.reads, -2), ("h_post", self._live.writes, -1)):
            known = self._of_connections(parts)
            if known is not None and all(part.shape[axis] == 1 for part in known):
                found[name] = ((*route, "stream"), self._stacked([part.squeeze(axis) for part in known]))
        return found

    def _of_connections(self, parts: Mapping[int, torch.Tensor]) -> list[torch.Tensor] | None:
        """One part of every connection of the group; None where some connection lacks it."""
        numbers = self._group.connections
        return [parts[number] for number in numbers] if all(number in parts for number in numbers) else None

    def _stacked(self, parts: list[torch.Tensor]) -> np.ndarray:
        return torch.stack(parts).cpu().numpy()[:, None, self.real]

    def _known(self, name: str) -> tuple[tuple[str, ...], np.ndarray]:
        """One coefficient of every connection, (C, 1, K, ...), with its dims."""
        if name not in self._coefficients:
            raise Unavailable(ONE_STREAM if self._num_streams == 1 else NOT_SHOWN)
        return self._coefficients[name]

    def signal_sizes(self) -> xr.Variable:
        """How much of each stream is read."""
        weights = self._known("h_pre")[1][:, 0]
        reads = [int(depth) for depth in self._group.connection_coords.get("depth_in", ((), ()))[1]]
        if not set(reads) <= set(self._group.depths):
            raise Unavailable(NOT_SHOWN)
        sizes = self._norms_LKV[[self._group.depths.index(depth) for depth in reads]][..., 1:]
        found = np.abs(weights) * sizes
        found[~np.isfinite(found).all(axis=(1, 2))] = np.nan
        return xr.Variable(("connection", "stream"), found.sum(axis=1))


def _token_sizes(states_KND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over streams of some tokens, and how large they are.

    Returns: The mean (K, D), float32; norms (K, V) of the views; and the median (V,) of the magnitudes that are not
    zero, NaN where all are.
    """
    views = with_mean(torch.from_numpy(states_KND)).numpy()
    norms = np.sqrt(np.square(views, dtype=np.float64).sum(axis=-1))
    medians = np.full(views.shape[1], np.nan)
    for v, sizes in enumerate(np.abs(views).swapaxes(0, 1).reshape(len(medians), -1)):
        number = np.count_nonzero(sizes)
        if number:
            # Zeros are the smallest: of a state after a ReLU most entries are, and so would the median be.
            middle = len(sizes) - number + number // 2
            ranked = np.partition(sizes, middle)
            upper = float(ranked[middle])
            medians[v] = upper if number % 2 else (upper + float(ranked[:middle].max())) / 2.0
    return views[:, 0], norms, medians
