"""Which quantities of a step are exact over every token? Sums, maxima and gains; what compares tokens is of sampled ones.

The sampled tokens are a trace of one sequence, from which quantities follow as from any other. Each function supplies the
quantity of its name, see `Quantities`.
Shapes: L depth, V view of the streams (their mean, then each of several), C connection, N stream, D feature, t every token, K
sampled token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.quantities.mixing_matrices import ONE_STREAM, over_last
from depthscope.diagnostics.quantities.registry import CHOICES, DIMS, Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import CUT_GRADIENT, STATE, WITHOUT_GRADIENT
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.run.connection_variables import connection_coords
from depthscope.probes.run.coverage import chain_groups, depth_coords
from depthscope.probes.run.statistics_dataset import GRADIENT
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.live_sums import PADDING, with_mean
from depthscope.probes.statistics.token_sums import TokenSums


@dataclass(frozen=True)
class LiveGroup:
    """One group of the run: a chain, or a stage of it."""

    chain: str  # name of the group; empty for the only one
    number: int  # of the chain
    depths: list[int]  # depths of the chain
    connections: list[int]  # stream connections of the chain; empty where it has none
    num_streams: int  # n
    depth_coords: Mapping[str, Any]  # coordinates, as in the trace
    connection_coords: Mapping[str, Any]  # coordinates, as in the trace
    attrs: Mapping[str, Any]  # of the run, and of the chain's own trace
    cut: list[int]  # depths that had a graph in the first measured step, and got no gradient

    @cached_property
    def facts(self) -> xr.Dataset:
        """What quantities depend on besides numbers: the attributes."""
        return xr.Dataset(attrs=self.attrs)

    @property
    def streams(self) -> list[str]:
        """Labels of the views: ``mean`` and, for several streams, their numbers."""
        return ["mean", *map(str, range(self.num_streams))] if self.num_streams > 1 else ["mean"]

    def path(self, name: str) -> str:
        """Where a variable of this group is in a run."""
        return f"{group_path('metrics', self.chain)}/{name}"

    def numbers(self, dims_of: Iterable[Any], values_of: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """Dims of an analysis in their order, and float64 values; NaN of a view of the streams that has none."""
        # One group of tokens, all that were sampled.
        dims = ["scope" if dim == "group" else dim for dim in dims_of]
        values = np.asarray(values_of, dtype=np.float64)
        if "stream" in dims and (lacks := len(self.streams) - values.shape[dims.index("stream")]):
            # The mean, which comes first, has no share of what is read or written; or it alone was measured.
            sides = (0, lacks) if values.shape[dims.index("stream")] == 1 else (lacks, 0)
            padding = [sides if dim == "stream" else (0, 0) for dim in dims]
            values = np.pad(values, padding, constant_values=np.nan)
        order = sorted(dims, key=DIMS.index)
        return tuple(order), np.transpose(values, [dims.index(dim) for dim in order])


def live_groups(session: Session, run: xr.DataTree) -> list[LiveGroup]:
    """The groups of a session whose first step was measured.

    ``session``: with its chains found and at least one sequence sampled.
    """
    found = []
    for number, chain in enumerate(session.structure.chains):
        for stage, (name, depths) in enumerate(chain_groups(session, number)):
            has_streams = chain.has_streams and number == 0 and stage == 0
            trace = run[group_path("trace", name)].to_dataset()
            found.append(
                LiveGroup(
                    chain=name,
                    number=number,
                    depths=depths,
                    connections=list(range(len(chain.connections))) if has_streams else [],
                    num_streams=trace.sizes["stream"],
                    depth_coords=depth_coords(chain, depths),
                    connection_coords=connection_coords(chain.connections) if has_streams else {},
                    attrs={str(name): value for name, value in (run.attrs | trace.attrs).items()},
                    cut=list(trace["gradient"].attrs.get(CUT_GRADIENT, [])) if "gradient" in trace else [],
                )
            )
    return found


PROFILE = ("depth", "stream")
GAINS = ("direction", "connection", "reduction")
# Such as gradients that were not asked for, or read weights that no tensor of the model shows.
NOT_SHOWN = "what it needs was not seen in the step"


EXACT_QUANTITIES = (
    *("mean_square_norm", "gradient_norms", "gradient_facts", "pair_cosines", "mean_adjacent_cosine"),
    *("mean_stream_cosine", "stream_pair_cosines", "connection_gains", "product_gains"),
    *("read_sizes", "write_sizes"),
)


def exact_quantities(sums: TokenSums, group: LiveGroup) -> Mapping[str, Callable[[], Any]]:
    """Functions by the quantity that they supply.

    ``sums``: of all forwards of the step, of the chain of the group.
    """
    of = _ExactQuantities(sums, group)
    return {name: getattr(of, name) for name in EXACT_QUANTITIES}


class _ExactQuantities:
    """The quantities of one group in one step."""

    def __init__(self, sums: TokenSums, group: LiveGroup) -> None:
        assert sums.live is not None
        self._sums, self._live = sums, sums.live
        self._depths, self._connections, self._group = group.depths, group.connections, group
        self.connection_gains, self.product_gains = (
            partial(self._gains, name) for name in ("gain", "product_gain")
        )
        self.read_sizes, self.write_sizes = (
            partial(self._sizes, name) for name in ("read_size_sum", "write_size_sum")
        )

    # --- states and gradients ---

    def mean_square_norm(self) -> xr.Variable:
        return xr.Variable(PROFILE, self._views("square_norm_sum") / self._count)

    def mean_adjacent_cosine(self) -> xr.Variable:
        return xr.Variable(PROFILE, self._views("adjacent_cosine_sum") / self._count)

    def pair_cosines(self) -> tuple[xr.Variable, xr.Variable]:
        directed = self._views("unit_count")
        total = self._views("unit_square") - directed
        # One variant of several; the others, of ordinary or centred tokens, need every token twice.
        shape = (1, *(len(CHOICES[dim]) for dim in ("tokens", "centering")), *directed.shape)
        found = np.full((2, *shape), np.nan)
        found[:, 0, 0, 0] = total, directed * (directed - 1.0)
        dims = ("group", "tokens", "centering", *PROFILE)
        return xr.Variable(dims, found[0]), xr.Variable(dims, found[1])

    def gradient_norms(self) -> xr.Variable:
        # That it was not measured its values do not say, since NaN is one of them.
        if not any(depth in self._sums.sums.get(GRADIENT, {}) for depth in self._depths):
            raise Unavailable(NOT_SHOWN)
        return xr.Variable(PROFILE, np.sqrt(self._views(GRADIENT)))

    def gradient_facts(self) -> dict[str, list[int]]:
        # Without these a gradient that no backward gives, such as that of an input, would look like a broken one.
        missing = [depth for depth in self._depths if depth not in self._sums.sums[GRADIENT]]
        cut = [depth for depth in self._group.cut if depth in missing]
        return {name: of for name, of in ((WITHOUT_GRADIENT, missing), (CUT_GRADIENT, cut)) if of}

    @cached_property
    def _count(self) -> np.ndarray:
        return self._views("token_count")

    def _views(self, name: str) -> np.ndarray:
        """One statistic of every view, (L, V): of the mean over several streams, then of each; NaN where missing."""
        mean = self._sums.mean_view
        arrays = []
        for part in [self._sums] if mean is None else [mean, self._sums]:
            known = part.sums.get("unit_sum" if name == "unit_square" else name, {})
            if name == "unit_square":
                known = {depth: unit.square().sum(-1) for depth, unit in known.items()}
            arrays.append(_stacked(known, self._depths))
        widest = max((array.shape[1] for array in arrays), default=1)
        return np.concatenate(arrays, axis=1) if name != "token_count" else arrays[0][:, :widest]

    # --- streams ---

    def mean_stream_cosine(self) -> xr.Variable:
        total, count = (self._of_streams(f"stream_cosine_{part}")[:, 0] for part in ("sum", "count"))
        return xr.Variable(("depth",), total / np.where(count > 0, count, np.nan))

    def stream_pair_cosines(self) -> xr.Variable:
        pairs, complete = (self._of_streams(f"pair_cosine_{part}") for part in ("sum", "count"))
        num_streams = round(pairs.shape[1] ** 0.5)
        upper = np.triu_indices(num_streams, 1)
        total = pairs.reshape(-1, num_streams, num_streams)[:, *upper]
        return xr.Variable(("depth", "pair"), total / np.where(complete > 0, complete, np.nan))

    def _of_streams(self, name: str) -> np.ndarray:
        if name not in self._live.sums:
            raise Unavailable(NOT_SHOWN)
        return _stacked(self._live.sums[name], self._depths)

    # --- connections ---

    def _gains(self, name: str) -> xr.Variable:
        """Gains of every connection, reduced over every token."""
        known = self._known(self._live.values, name)
        gains = torch.stack([known[number] for number in self._connections]).cpu().numpy()  # (C, t, 2)
        gains = gains[:, gains[0, :, 0] != PADDING]
        values = over_last(np.moveaxis(gains, 1, -1))  # (C, 2, reduction)
        return xr.Variable(GAINS, np.moveaxis(values, 1, 0))

    def _sizes(self, name: str) -> xr.Variable:
        known = self._known(self._live.sums, name)
        return xr.Variable(("connection", "stream"), _stacked(known, self._connections))

    def _known(
        self, parts: Mapping[str, Mapping[int, torch.Tensor]], name: str
    ) -> Mapping[int, torch.Tensor]:
        """What is known of the connections, which is of all of them."""
        known = parts.get(name, {})
        if not all(number in known for number in self._connections):
            raise Unavailable(NOT_SHOWN)
        return known


def _stacked(parts: Mapping[int, torch.Tensor], keys: Sequence[int]) -> np.ndarray:
    """Vectors by key, (keys, …), read back from their device at once; NaN where one is missing."""
    known = [key for key in keys if key in parts]
    if not known:
        return np.full((len(keys), 1), np.nan)
    # In float64 here: some devices have none.
    values = torch.stack([parts[key].reshape(-1) for key in known]).cpu().double().numpy()
    found = np.full((len(keys), values.shape[1]), np.nan)
    found[[list(keys).index(key) for key in known]] = values
    return found


# --- of the sampled tokens ---

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
