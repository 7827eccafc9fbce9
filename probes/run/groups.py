"""Which groups does a run have? One per chain, or per stage of a chain whose states change their width or token count."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from depthscope.diagnostics import schema
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Chain


class Group(NamedTuple):
    """Depths of a chain whose states have one shape, so that they fit into one array."""

    name: str
    depths: list[int]


def chain_groups(session: Session, number: int) -> list[Group]:
    """Split a chain where the width or the number of tokens of its states changes; only states that are stored count."""
    chain = session.structure.chains[number]
    selection = session.options.selection
    stages: list[list[int]] = []
    for depth in sorted(selection.stored(chain)):
        if stages and chain.shapes[stages[-1][-1]] == chain.shapes[depth]:
            stages[-1].append(depth)
        else:
            stages.append([depth])
    # A chain of one stage has the chain's own name: runs of plain transformers have no groups below /trace.
    if len(stages) == 1:
        return [Group(chain.name, stages[0])]
    prefix = f"{chain.name}_" if chain.name else ""
    return [Group(f"{prefix}stage{i}", depths) for i, depths in enumerate(stages)]


def connections_within(chain: Chain, depths: list[int]) -> list[int]:
    """The positions of the connections that join two states of a group; others lead from one stage into the next."""
    first = last = depths[0]
    while first > 0 and chain.shapes[first - 1] == chain.shapes[first]:
        first -= 1
    while last + 1 < len(chain.shapes) and chain.shapes[last + 1] == chain.shapes[last]:
        last += 1
    connections = enumerate(chain.connections)
    return [at for at, of in connections if first <= of.depth_in and of.depth_out <= last]


def depth_coords(chain: Chain, depths: list[int]) -> dict[str, Any]:
    """Coordinates of the depth axis of a group."""
    points = [chain.points[depth] for depth in depths]
    return {
        "depth": np.array(depths),
        "layer": ("depth", np.array([point.layer for point in points])),
        "site": ("depth", np.array([point.site for point in points], dtype=object)),
        "module": ("depth", np.array([point.module for point in points], dtype=object)),
    }


def without_gradient(
    depths: list[int], reached: set[int], carried: set[int] | None = None
) -> dict[str, list[int]]:
    """The attributes that list depths which no gradient reached: below frozen weights, or below what detaches a state.

    ``carried`` are those that have a graph: their gradient was cut on its way, where it reached a later depth.
    """
    missing = [depth for depth in depths if depth not in reached]
    cut = [depth for depth in missing if depth in (carried or ()) and max(reached, default=-1) > depth]
    named = {schema.WITHOUT_GRADIENT: missing, schema.CUT_GRADIENT: cut}
    return {name: of for name, of in named.items() if of}
