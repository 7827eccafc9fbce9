"""Which depths and connections does a group of a live row have? And how its matrices are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

from depthscope.diagnostics.schema import CUT_GRADIENT
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.run.connection_variables import connection_coords
from depthscope.probes.run.groups import chain_groups, depth_coords
from depthscope.probes.session.session import Session


@dataclass(frozen=True)
class LiveGroup:
    """One group of the run: a chain, or a stage of it.

    Parameters
    ----------
    chain : str
        Name of the group; empty for the only one.
    number : int
        Of the chain.
    depths : list of int
        Depths of the chain.
    connections : list of int
        Stream connections of the chain; empty where it has none.
    num_streams : int
        n.
    depth_coords, connection_coords : mapping
        Coordinates, as in the trace.
    attrs : mapping
        Of the run, and of the chain's own trace.
    dtype : torch.dtype
        In which states are multiplied.
    cut : list of int
        Depths that had a graph in the first measured step, and got no gradient.
    """

    chain: str
    number: int
    depths: list[int]
    connections: list[int]
    num_streams: int
    depth_coords: Mapping[str, Any]
    connection_coords: Mapping[str, Any]
    attrs: Mapping[str, Any]
    dtype: torch.dtype
    cut: list[int]

    @property
    def streams(self) -> list[str]:
        """Labels of the views: ``mean`` and, for several streams, their numbers."""
        return ["mean", *map(str, range(self.num_streams))] if self.num_streams > 1 else ["mean"]

    @property
    def mixes_known(self) -> bool:
        """Whether the matrices that the model applies are those that were read."""
        return True

    @property
    def transposed(self) -> bool:
        """Whether the matrices are source by destination."""
        return False

    def applied(self, number: int, mix: torch.Tensor) -> torch.Tensor:
        """H_res (K, N, N), destination by source."""
        return mix

    def path(self, name: str) -> str:
        """Where a variable of this group is in a run."""
        return f"{group_path('metrics', self.chain)}/{name}"

    def with_all_streams(self, value: xr.DataArray) -> xr.DataArray:
        """A value whose stream axis, where it has one, has the labels of all views; NaN where it has no such view."""
        if "stream" not in value.dims or value["stream"].values.tolist() == self.streams:
            return value
        return value.reindex(stream=self.streams)


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
