"""Which depths and connections does a group of a live row have? And how its matrices are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.quantities.registry import DIMS
from depthscope.diagnostics.schema import CUT_GRADIENT
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.run.connection_variables import connection_coords
from depthscope.probes.run.groups import chain_groups, depth_coords
from depthscope.probes.session.session import Session


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
    dtype: torch.dtype  # in which states are multiplied
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
            # The mean, which comes first, has no share of what is read or written.
            padding = [(lacks if dim == "stream" else 0, 0) for dim in dims]
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
                    dtype=session.observer.precision,
                    cut=list(trace["gradient"].attrs.get(CUT_GRADIENT, [])) if "gradient" in trace else [],
                )
            )
    return found
