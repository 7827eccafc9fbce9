"""Which quantities of a step are exact over every token? Those that its sums, maxima and gains give.

Each function supplies the quantity of its name, see `Quantities`.
Shapes: L depth, V view of the streams (their mean, then each of several), C connection, N stream, t every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.quantities.mixing_matrices import over_last
from depthscope.diagnostics.quantities.registry import CHOICES, DIMS, Unavailable
from depthscope.diagnostics.schema import CUT_GRADIENT, WITHOUT_GRADIENT
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.run.connection_variables import connection_coords
from depthscope.probes.run.coverage import chain_groups, depth_coords
from depthscope.probes.run.statistics_dataset import GRADIENT
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.live_sums import PADDING
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
