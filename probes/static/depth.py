"""Which sub-block reads what, over depth? Reads that a later sub-block applies, and attention over the outputs of blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from depthscope.probes.static.facts import DepthRead, StaticConnection

COLLAPSE = "the read that the last sub-block computes collapses the streams before the final norm"
OPEN_READ = "which read is applied here depends on a sub-block whose connection the files do not contain"


def applied_reads(
    connections: Sequence[StaticConnection], lacking: Collection[str] = ()
) -> tuple[list[StaticConnection], list[StaticConnection]]:
    """Connections with the reads that are applied at them, where the sub-block before computes them.

    Sub-block k applies the read of k − 1; the first one reads stream 0 alone, and the read of the last one collapses the
    streams at the end, as in DeepSeek-V4.1.

    ``connections``: in the order of depth, with the reads that they compute.
    ``lacking``: chains some of whose connections are in files that are not there.
    Returns: None for a read that another sub-block computes whose connection is missing.
    """
    chains: dict[str, list[StaticConnection]] = defaultdict(list)
    for one in connections:
        chains[one.chain].append(one)
    lagged = [chain for chain, members in chains.items() if members[0].read_lag == 1]
    if not lagged:
        return list(connections), []
    main = max(lagged, key=lambda chain: len(chains[chain]))
    shifted: dict[int, StaticConnection] = {}
    for chain in lagged:
        members = chains[chain]
        first = (np.eye(members[0].streams)[0] if members[0].layer <= 0 else None) if chain == main else None
        reads = [first, *(one.h_pre for one in members[:-1])]
        # With a gap, the sub-block before is not the one that is listed before.
        whole = chain not in lacking and not missing_places(members)
        for one, read in zip(members, reads, strict=True):
            kept = read if whole else None
            note = one.note if kept is not None else f"{one.note}; {OPEN_READ}".removeprefix("; ")
            shifted[id(one)] = replace(one, h_pre=kept, note=note)
    last = chains[main][-1]
    head = replace(
        last, family="head", branch="head", h_res=None, h_post=None, logits=None, sinkhorn={}, mixing=None,
        note=COLLAPSE, dtypes=(), gates={}, read_lag=0, constraint="",
    )  # fmt: skip
    return [shifted.get(id(one), one) for one in connections], [
        head
    ] if last.h_pre is not None and main not in lacking else []


def missing_places(members: Sequence[StaticConnection]) -> list[str]:
    """Layers and branches of a chain, from its first to its last, without a connection where the others have one."""
    layers = {one.layer for one in members}
    if layers == {-1}:  # paths without numbers
        return []
    # A branch counts as usual where at least half of the layers have it.
    often = Counter(branch for layer, branch in {(one.layer, one.branch) for one in members})
    usual = [branch for branch, count in often.items() if 2 * count >= len(layers)]
    present = {(one.layer, one.branch) for one in members}
    return [
        f"layer {layer} {branch}"
        for layer in range(min(layers), max(layers) + 1)
        for branch in usual
        if (layer, branch) not in present
    ]


def depth_read(query: np.ndarray, block: float, layer: int, branch: str, layers: int) -> DepthRead:
    """What weights alone tell of an attention residual of blocks of layers.

    At a layer that is a multiple of ``block``, the state so far becomes a source and begins anew with the attention's output.

    ``query``: (k, D), what the normalised sources are multiplied by.
    ``layer``: number of the layer, -1 for the read at the end.
    """
    size = max(int(block), 1)
    # Sources that are closed before this layer.
    finished = -(-(layers if branch == "head" else layer) // size)
    if branch == "mlp":
        finished = layer // size + 1  # with the one that this layer's attention has closed
    # The first attention has nothing but the embedding to read: its query, where one is stored, is not applied.
    sources = 0 if branch == "attn" and layer == 0 else finished + 1
    norms = tuple(float(norm) for norm in np.linalg.norm(query, axis=-1))
    return DepthRead(sources, size, branch == "attn" and layer % size == 0, norms)
