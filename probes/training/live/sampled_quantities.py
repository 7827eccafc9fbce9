"""Which quantities of a step are of the sampled tokens? Those that compare tokens, or the depths of a token.

Each function supplies the quantity of its name, see `Quantities`; all depths are computed at once.
Shapes: L depth, K sampled token, V view of the streams (their mean, then each of several), N stream, D feature, C connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.kernels import similarity as kernel
from depthscope.diagnostics.kernels.rank.spectrum import GRAM_LIMIT
from depthscope.diagnostics.metrics.similarity import angle_sums
from depthscope.diagnostics.quantities.mixing_matrices import ONE_STREAM, Mixing
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

SAMPLED_QUANTITIES = (
    *("residual", "mask", "h_res", "h_pre", "h_post"),
    *("massive", "token_masks", "token_counts", "ordinary_tokens", "num_features", "num_profiles"),
    *("singular_values", "row_fourth_powers", "cka_table", "depth_angles", "mean_turns"),
    *("token_norms", "gradient_token_norms", "mixing", "signal_sizes"),
)

SPECTRA = ("tokens", "centering", "depth", "component")


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
    ``each_stream``: whether spectra are of each of several streams too, which costs as much again for each; NaN
    otherwise.
    """

    def __init__(self, sums: TokenSums, group: LiveGroup, *, each_stream: bool) -> None:
        assert sums.live is not None
        self._sums, self._live, self._group, self._each_stream = sums, sums.live, group, each_stream
        self.real = self._real(len(self._live.states[group.depths[0]]))
        # (K, N, D) by depth.
        self.states = [self._of_real(self._live.states[depth]) for depth in group.depths]
        self.count, self._num_streams, self._width = self.states[0].shape
        sizes = [_token_sizes(states_KND) for states_KND in self.states]
        self._mean_LKD, self._norms_LKV, self._medians_LV = (
            np.stack(parts) for parts in zip(*sizes, strict=True)
        )
        self.massive_K = self._massive_tokens()

    def _of_real(self, values_K: torch.Tensor) -> np.ndarray:
        values = values_K.cpu().numpy()
        return values if self.real.all() else values[self.real]

    def _real(self, count: int) -> np.ndarray:
        real = self._live.places[self._group.depths[0]].real_K
        return np.ones(count, dtype=bool) if real is None else real.cpu().numpy()

    def source(self, exact: Mapping[str, Callable[[], Any]]) -> Quantities:
        """The quantities of the step; ``exact``: those that are known of every token."""
        supplied = {name: getattr(self, name) for name in SAMPLED_QUANTITIES}
        return Quantities(self._group.facts, choices=CHOSEN, supplied={**supplied, **exact})

    # --- as a trace that has the sampled tokens as one sequence ---

    def residual(self) -> xr.DataArray:
        """States of every stream."""
        coords = {**self._group.depth_coords, "stream": np.arange(self._num_streams)}
        return xr.DataArray(np.stack(self.states)[:, None], coords, STATE, "residual")

    def mask(self) -> xr.DataArray:
        """All of them are real."""
        return xr.DataArray(np.ones((1, self.count), dtype=bool), dims=("sample", "token"), name="mask")

    def h_res(self) -> xr.DataArray:
        """Mixing matrices as the model applies them."""
        return self._coefficient("h_res")

    def h_pre(self) -> xr.DataArray:
        """Read weights."""
        return self._coefficient("h_pre")

    def h_post(self) -> xr.DataArray:
        """Write weights."""
        return self._coefficient("h_post")

    def _coefficient(self, name: str) -> xr.DataArray:
        dims, values = self._known(name)
        return xr.DataArray(values, self._group.connection_coords, dims, name)

    # --- which tokens ---

    def _massive_tokens(self) -> np.ndarray:
        """Which tokens have a massive activation at any depth."""
        found = np.zeros(self.count, dtype=bool)
        limits = np.maximum(ABSOLUTE, RELATIVE * self._medians_LV)
        for depth, view in np.argwhere(self._largest() > limits):  # none in most networks
            sizes = np.abs(with_mean(torch.from_numpy(self.states[depth])).numpy()[:, view])
            if np.isfinite(sizes).all():
                found |= (sizes > limits[depth, view]).any(axis=1)
        return found

    def _largest(self) -> np.ndarray:
        """The largest magnitude of every token, (L, V), at least that of the sampled ones."""
        values = [self._live.values["largest"][depth].amax(0) for depth in self._group.depths]
        return torch.stack(values).double().cpu().numpy()

    def massive(self) -> Massive:
        """Sizes of every token, and which of the sampled ones are massive."""
        fraction, ratio, how = self._massive_activations()
        return Massive(
            # Of every stream, also where only their mean is measured.
            token=xr.Variable(("sample", "token"), self.massive_K[None]),
            fraction=xr.Variable(PROFILE, fraction, {"estimator": how}),
            ratio=xr.Variable(PROFILE, ratio, {"estimator": how}),
            features=(),
            tokens_per_sequence=float(self.count),
        )

    def _massive_activations(self) -> tuple[np.ndarray, np.ndarray, str]:
        """Share of massive tokens and the largest activation over the median (L, V): sizes of every token, medians of some."""
        how = f"largest activation of every token; median {sampled(self.count)}"
        depths = self._group.depths
        count = np.array([float(self._sums.sums["token_count"][depth]) for depth in depths])
        fractions, ratios = [], []
        for depth, median_V, real in zip(depths, self._medians_LV, count, strict=True):
            values_tV = self._live.values["largest"][depth].cpu().numpy().astype(np.float64)
            massive = (values_tV > ABSOLUTE) & (values_tV > RELATIVE * median_V)
            undefined = np.where(np.isnan(values_tV).any(axis=0), np.nan, 0.0)
            fractions.append(massive.sum(axis=0) / real + undefined)
            ratios.append(values_tV.max(axis=0) / median_V)
        return np.array(fractions), np.array(ratios), how

    def token_masks(self) -> xr.Variable:
        """All of them, and those without massive activations."""
        kinds = np.stack([np.ones(self.count, dtype=bool), ~self.massive_K])
        return xr.Variable(("tokens", "sample", "token"), kinds[:, None])

    def token_counts(self) -> xr.Variable:
        """How many these are."""
        counts = np.array([[self.count], [self.count - self.massive_K.sum()]], dtype=float)
        return xr.Variable(("tokens", "group"), np.where(counts > 0, counts, np.nan))

    def ordinary_tokens(self) -> np.ndarray:
        """Which have no massive activation."""
        return ~self.massive_K

    def num_features(self) -> int:
        """D."""
        return int(self._width)

    def num_profiles(self) -> tuple[int, int]:
        """L and V."""
        return len(self.states), len(self._group.streams)

    def _by_kind(self, clouds: tuple[Cloud, Cloud], measure: Callable[[Cloud], np.ndarray]) -> np.ndarray:
        """Of all tokens and of the ordinary ones, which are the same in most networks."""
        every = measure(clouds[0])
        return np.stack([every, every if clouds[0] is clouds[1] else measure(clouds[1])])

    # --- spectra and similarities ---

    @cached_property
    def _of_mean(self) -> tuple[Cloud, Cloud]:
        return self._clouds(self._mean_LKD)

    def _clouds(self, states_LKD: np.ndarray) -> tuple[Cloud, Cloud]:
        every = Cloud(states_LKD)
        return every, every if not self.massive_K.any() else Cloud(states_LKD[:, ~self.massive_K])

    @cached_property
    def _views(self) -> list[tuple[Cloud, Cloud]]:
        """The mean over streams, and each of several where these are measured too."""
        if not self._each_stream or self._num_streams == 1:
            return [self._of_mean]
        states_LKND = np.stack(self.states)
        return [self._of_mean, *(self._clouds(states_LKND[:, :, n]) for n in range(self._num_streams))]

    def _over_views(self, measure: Callable[[Cloud], np.ndarray], dims: tuple[str, ...]) -> xr.Variable:
        """Measure every view, of all tokens and of the ordinary ones; NaN for streams that are not measured."""
        found = [self._by_kind(clouds, measure) for clouds in self._views]
        unknown = np.full_like(found[0], np.nan)
        found += [unknown] * (len(self._group.streams) - len(found))
        return xr.Variable(("group", "stream", *dims), np.stack(found)[None])

    def singular_values(self) -> xr.Variable:
        """Of all tokens and of ordinary ones, raw and centred."""
        width = min(self.count, self._width)
        return self._over_views(lambda cloud: cloud.singular_values(width), SPECTRA)

    def row_fourth_powers(self) -> xr.Variable:
        """Sums of ‖x‖⁴, as those spectra."""
        return self._over_views(lambda cloud: cloud.fourth_powers, SPECTRA[:-1])

    def cka_table(self) -> xr.Variable:
        """Unbiased CKA between depths, of the mean over streams."""
        found = self._by_kind(self._of_mean, lambda cloud: cloud.cka)
        return xr.Variable(("estimator", "tokens", "depth", "other_depth"), found[None])

    def depth_angles(self) -> tuple[xr.Variable, xr.Variable]:
        """Sums of angles between depths, and their numbers, of the mean over streams."""
        sums = self._by_kind(self._of_mean, lambda cloud: cloud.angle_sums)
        dims = ("tokens", "depth", "other_depth")
        return xr.Variable(dims, sums[:, 0]), xr.Variable(dims, sums[:, 1])

    def mean_turns(self) -> xr.Variable:
        """Mean of 1 − cos with the depth before, of the mean over streams."""
        found = self._by_kind(self._of_mean, lambda cloud: cloud.turns)
        return xr.Variable(("tokens", "depth"), found)

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

    def mixing(self) -> Mixing:
        """The mixing matrices."""
        dims, matrices = self._known("h_res")
        return Mixing(xr.DataArray(matrices, dims=dims), self.mask())

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


class Cloud:
    """Some of the sampled tokens in one view: their products, from which spectra and similarities follow.

    ``states_LKD``: a depth that is not finite leaves NaN.
    """

    def __init__(self, states_LKD: np.ndarray) -> None:
        self._finite = np.isfinite(states_LKD).all(axis=(1, 2))
        if not self._finite.all():  # kernels refuse what is not finite
            states_LKD = np.where(self._finite[:, None, None], states_LKD, np.float32(0.0))
        self._states = states_LKD

    @cached_property
    def _products(self) -> tuple[np.ndarray, np.ndarray]:
        """Products of every two tokens of a depth, (L, K, K) in float64: of the states, and of these less their mean."""
        centered = self._states.astype(np.float64)
        # Centred first, which is exact under any common offset, and the mean put back: one product for both.
        mean = centered.mean(axis=1, keepdims=True)
        centered -= mean
        products = centered @ centered.swapaxes(1, 2)
        along = centered @ mean.swapaxes(1, 2)  # (L, K, 1)
        square = mean @ mean.swapaxes(1, 2)
        return products + along + along.swapaxes(1, 2) + square, products

    def singular_values(self, width: int) -> np.ndarray:
        """As `kernels.rank.singular_values`, raw and centred, (2, L, width); zero beyond the rank."""
        depths, count, _ = self._states.shape
        found = np.zeros((2, depths, width))
        if count:
            for at, products in enumerate(self._products):
                spectra = self._singular_values(products, center=at == 1)
                found[at, :, : spectra.shape[-1]] = spectra
        found[:, ~self._finite] = np.nan
        return found

    def _singular_values(self, products_LKK: np.ndarray, *, center: bool) -> np.ndarray:
        """From products that are known already, (L, min(K, D))."""
        _, count, width = self._states.shape
        possible = min(count - center, width)
        energy = np.linalg.eigvalsh(products_LKK)[:, ::-1][:, : min(count, width)].clip(min=0.0)
        energy[:, possible:] = 0.0
        spectra = np.sqrt(energy)
        # There the kernel decomposes the states themselves.
        unreliable = (energy[:, possible - 1] < GRAM_LIMIT * energy[:, 0]) & (energy[:, 0] > 0)
        if possible and unreliable.any():
            spectra[unreliable] = rank.singular_values(self._states[unreliable], center=center)
        return spectra

    @property
    def fourth_powers(self) -> np.ndarray:
        """Σ ‖x‖⁴ over tokens, raw and centred, (2, L)."""
        if not self._states.shape[1]:
            return np.zeros((2, len(self._states)))
        return np.stack([(np.diagonal(of, axis1=1, axis2=2) ** 2).sum(axis=1) for of in self._products])

    @property
    def cka(self) -> np.ndarray:
        """Unbiased CKA of every two depths, as `kernels.similarity.cka_matrix`."""
        depths, n, _ = self._states.shape
        if n < 4:
            return np.full((depths, depths), np.nan)
        centered_LKK = self._products[1]
        # At unit size, so that no product of two depths overflows.
        diagonal = np.diagonal(centered_LKK, axis1=1, axis2=2)
        size = diagonal.max(axis=1)
        size = np.where(size > 0, size, 1.0)[:, None]
        distinct = centered_LKK.reshape(depths, -1) / size
        distinct[:, :: n + 1] = 0.0
        squares = diagonal / size
        traces = squares.sum(axis=1)
        # Song's HSIC₁ where rows of the products add up to zero, of distinct tokens alone: see `similarity.layer_cka`.
        table = distinct @ distinct.T + np.outer(traces, traces) / ((n - 1) * (n - 2))
        table -= 2.0 / (n - 2) * (squares @ squares.T)
        own = np.diagonal(table)
        return self._of_finite_pairs(np.asarray(kernel.cka_from_hsic(table, own[:, None], own[None, :])))

    @cached_property
    def _directions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Unit vectors (K, L, D), zero where the state is; whether a token has a direction; 1 − cos to the depth before."""
        tokens = self._states.swapaxes(0, 1).astype(np.float64)
        length = np.linalg.norm(tokens, axis=-1, keepdims=True)
        unit = tokens / np.where(length > 0, length, 1.0)
        # By the difference of unit vectors, which does not cancel for blocks that turn states by little.
        return unit, length[..., 0] > 0, np.square(unit[:, 1:] - unit[:, :-1]).sum(axis=-1) / 2.0

    @property
    def angle_sums(self) -> np.ndarray:
        """Sums of angles between depths and their numbers, (2, L, L)."""
        depths, count, _ = self._states.shape
        if not count:
            return np.zeros((2, depths, depths))
        unit_KLD, directed_KL, _ = self._directions
        return self._of_finite_pairs(angle_sums(unit_KLD, directed_KL))

    @property
    def turns(self) -> np.ndarray:
        """Mean of 1 − cos between a depth and the one before, (L,)."""
        found = np.full(len(self._states), np.nan)
        if self._states.shape[1]:
            _, directed_KL, turned = self._directions
            known = directed_KL[:, 1:] & directed_KL[:, :-1]
            number = known.sum(axis=0)
            found[1:] = np.where(known, turned, 0.0).sum(axis=0) / np.where(number > 0, number, np.nan)
            found[1:][~(self._finite[1:] & self._finite[:-1])] = np.nan
        return found

    def _of_finite_pairs(self, tables: np.ndarray) -> np.ndarray:
        return np.where(self._finite[:, None] & self._finite[None, :], tables, np.nan)


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
