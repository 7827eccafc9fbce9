"""Which weights belong to which chain and block? The norms of weight updates as variables of the chains' statistics."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from depthscope.diagnostics.schema import FROZEN_MODULES
from depthscope.probes.statistics.weight_updates import VARIABLES, WeightNorms
from depthscope.probes.structure.chain import Chain

OUTSIDE_BLOCKS = -1  # for a layer


def weight_variables(
    rows: Sequence[WeightNorms | None],
    chains: Sequence[Chain],
    number: int,
    starts: Sequence[int],
    stage: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables and coordinates of one group of ``/statistics``; empty where nothing was measured.

    A module belongs to the chain whose block contains it, any other one to the first chain. Of a chain's stages, whose first
    depths are ``starts``, each gets the modules of the blocks that end in it.
    """
    measured = next((row for row in reversed(rows) if row is not None), None)
    if measured is None:
        return {}, {}
    chosen, layers = [], []
    for i, path in enumerate(measured.paths):
        chain, layer, depth = _chain_layer_depth(path, chains)
        # Of the stage that contains this depth; weights before the first stored depth go to the first stage.
        if chain == number and max(0, bisect_right(starts, depth) - 1) == stage:
            chosen.append(i)
            layers.append(layer)
    if not chosen:
        return {}, {}
    # A weight variable covers all steps of the run: NaN in those that measured no weights.
    undefined = np.full(len(measured.paths), math.nan)
    variables: dict[str, Any] = {}
    for name in VARIABLES:
        values = np.stack([undefined if row is None else row.values[name] for row in rows])
        variables[name] = (("step", "weight"), values[:, chosen])
    frozen = [measured.paths[i] for i in chosen if measured.paths[i] in measured.frozen]
    if frozen:
        # Of the last step: its update is undefined, since nothing was to change.
        update = "weight_update_square_norm"
        variables[update] = (*variables[update], {FROZEN_MODULES: frozen})
    variables["weight_count"] = ("weight", measured.counts[chosen])
    coords = {
        "weight": np.array([measured.paths[i] for i in chosen], dtype=object),
        "weight_layer": ("weight", np.array(layers, dtype=int)),
    }
    return variables, coords


def _chain_layer_depth(path: str, chains: Sequence[Chain]) -> tuple[int, int, int]:
    """Chain, block number and last depth of a module; outside of all blocks the start of the first chain."""
    for number, chain in enumerate(chains):
        layers = _block_layers(chain)
        containing = [block for block in layers if path == block or path.startswith(f"{block}.")]
        if containing:
            layer = layers[max(containing, key=len)]  # the innermost of nested blocks
            own = [i for i, place in enumerate(chain.points) if place.layer == layer]
            # The state of a block may be none of the chain's, as that of the first one where queries read outputs.
            earlier = [i for i, place in enumerate(chain.points) if place.layer < layer]
            return number, layer, max(own or earlier, default=0)
    return 0, OUTSIDE_BLOCKS, 0


def _block_layers(chain: Chain) -> dict[str, int]:
    """Paths of the modules with a block's weights, with the number of the block among the depths."""
    layers: dict[str, int] = {}
    for place, following in pairwise(chain.points):
        if place.path in chain.blocks:
            # A state read at a block's input was made by the block before: this block makes the next one.
            layers.setdefault(place.path, following.layer if place.at == "input" else place.layer)
    for link in chain.connections:
        around = [block for block in chain.blocks if link.path.startswith(f"{block}.")]
        for path in filter(None, (*around, link.path, link.branch_path)):
            layers.setdefault(path, link.layer)
    return layers
