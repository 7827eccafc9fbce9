"""Which tensors of a checkpoint are stream connections, and where in the network? Those that a family's pattern fits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from depthscope.probes.checkpoints.safetensors_header import StoredTensor
from depthscope.probes.connections.families import FAMILIES
from depthscope.probes.connections.weight_pattern import FoundTensors, Leaves, WeightPattern

PATTERNS = tuple(pattern for family in FAMILIES for pattern in family.weights)
CONNECTIONS = tuple(pattern for pattern in PATTERNS if not pattern.head)
HEADS = tuple(pattern for pattern in PATTERNS if pattern.head)

# Words of module paths, in the order in which a block runs its branches.
BRANCHES = (
    ("altup", re.compile(r"altup", re.IGNORECASE)),
    ("attn", re.compile(r"att|ssm|mamba|retention", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert", re.IGNORECASE)),
)


def find_connections(tensors: Mapping[str, StoredTensor]) -> list[tuple[WeightPattern, FoundTensors]]:
    """Connections among tensors, in the order of depth, and the heads that read their streams.

    Parameters
    ----------
    tensors : Mapping of str to StoredTensor
        By full name.

    Returns
    -------
    list of (WeightPattern, FoundTensors)
        Heads are last. A head has the shapes of a small layer, so it counts only where connections have as many streams of
        the same width.
    """
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        # x.proj.weight and x.scale are leaves of one module x: a Linear of it and a parameter of its own
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        modules[module][leaf] = tensor
    found = [(pattern, one) for pattern in CONNECTIONS for one in _matches(pattern, modules)]
    sizes = {(one.streams, one.width) for _, one in found}
    heads = [(pattern, one) for pattern in HEADS for one in _matches(pattern, modules)]
    return [
        *sorted(found, key=lambda pair: _depth_order(pair[1].module)),
        *((pattern, one) for pattern, one in heads if (one.streams, one.width) in sizes),
    ]


def _matches(pattern: WeightPattern, modules: Mapping[str, Leaves]) -> Iterator[FoundTensors]:
    for module, leaves in modules.items():
        yield from pattern.find(module, leaves)


@dataclass(frozen=True)
class Place:
    """Where in the network a module is."""

    chain: str
    layer: int
    branch: str


def place_of(module: str, inside: Sequence[str] = ()) -> Place:
    """Chain, layer and branch of a connection, from the words of its path or of the tensors in its branch.

    Parameters
    ----------
    module : str
        Path of the connection.
    inside : sequence of str
        Names of the tensors below it.

    Returns
    -------
    Place
        Layer -1 where the path has no number.
    """
    parts = module.split(".")
    # the first number of a path counts the blocks; what follows it names the part of the block
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    own = parts if at is None else parts[at + 1 :]
    # The innermost name is the most specific one; what is inside the module counts last.
    branch = next((found for text in (*reversed(own), *inside) if (found := _branch_named_in(text))), "block")
    return Place("", -1, branch) if at is None else Place(".".join(parts[:at]), int(parts[at]), branch)


def _branch_named_in(text: str) -> str:
    return next((branch for branch, words in BRANCHES if words.search(text)), "")


def _depth_order(module: str) -> tuple[Any, ...]:
    """Sort key: chain, then every number of the path, then attention before feed-forward, as blocks run them."""
    ranks = {branch: rank for rank, (branch, _) in enumerate(BRANCHES)}
    place = place_of(module)
    # As numbers: sorted as text, block 10 would come before block 2.
    numbers = tuple(int(part) for part in module.split(".") if part.isdigit())
    return place.chain, numbers, ranks.get(place.branch, len(ranks)), module
