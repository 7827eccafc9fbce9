"""How many streams has a model? What its connections or its states show; what only the user says is called asserted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from depthscope.probes.connections.family import Site
from depthscope.probes.model.layout import LayoutError, count_streams
from depthscope.probes.structure.chain import Chain


def require_count(
    chain: Chain, layout: str, sites: Mapping[int, Site], batch_size: int, asserted: int | None
) -> int:
    """The number of streams; LayoutError where the model has another one than the user says."""
    site = next(iter(sites.values()), None)
    if site is None:
        return count_streams(chain.shapes[0], layout, batch_size, asserted)
    if asserted not in (None, site.num_streams, site.num_streams // site.fractions):
        raise LayoutError(
            f"streams={asserted} came, but the connections of this model have {site.num_streams}; leave streams= out"
        )
    return site.num_streams


def with_asserted_streams(chain: Chain, num_streams: int) -> Chain:
    """A chain without known connections; that a part of its state is a stream is not read from the model."""
    if num_streams == 1 or chain.history:
        return chain
    asserted = f"unproven: {num_streams} streams are asserted by layout= and streams=; nothing in the model shows them"
    return replace(chain, proof=asserted)
