"""Which tensors of a checkpoint are stream connections? Those whose shapes fit together as the parts of one.

Shapes: ``n`` streams of width ``D``, ``f`` fractions of each, ``v`` inputs of the branch.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from depthscope.probes.checkpoints.tensor_inventory import StoredTensor
from depthscope.probes.static.formulas import SINKHORN_ROUNDS, Settings

Leaves = Mapping[str, StoredTensor]  # of one module, by the last part of their names
GATED_NAMES = re.compile(r"hyper|inject|\bhc_", re.IGNORECASE)
BRANCHES = (
    ("altup", re.compile(r"altup", re.IGNORECASE)),
    ("attn", re.compile(r"att|ssm|mamba|retention", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Found:
    """Tensors that make one connection; those in ``roles`` tell its weights."""

    module: str
    streams: int
    width: int | None
    roles: Mapping[str, StoredTensor]
    unread: tuple[StoredTensor, ...] = ()
    fractions: int = 1


@dataclass(frozen=True)
class Family:
    """A kind of connection: how its tensors fit together."""

    name: str
    style: str
    looked_for: str
    find: Callable[[str, Leaves], Iterator[Found]]
    settings: Settings = field(default_factory=dict)
    constrained: bool = False
    learns_mixing: bool = True


# --- one projection for all weights: transformers' mHC, independent HC and their head


def _projected(num_scales: int, streams_of: Callable[[int], int]) -> Callable[[str, Leaves], Iterator[Found]]:
    """A projection (k, n·D), a bias (k) and ``num_scales`` scales, beside one another."""

    def find(module: str, leaves: Leaves) -> Iterator[Found]:
        scales = {name: leaf for name, leaf in leaves.items() if leaf.shape == (num_scales,)}
        for scale_name, scale in scales.items():
            stem = scale_name.rpartition("_")[0]
            beside = [leaf for name, leaf in leaves.items() if name.rpartition("_")[0] == stem]
            biases = [leaf for leaf in beside if len(leaf.shape) == 1 and leaf is not scale]
            projections = [leaf for leaf in beside if len(leaf.shape) == 2]
            for bias, projection in ((b, p) for b in biases for p in projections):
                n, inputs = streams_of(bias.shape[0]), projection.shape[1]
                if projection.shape[0] == bias.shape[0] and n > 1 and inputs % n == 0 and inputs // n > n:
                    path = module if module and stem in ("", "hc") else f"{module}.{stem}".strip(".")
                    yield Found(path, n, inputs // n, {"base": bias, "scale": scale}, (projection,))

    return find


def _streams_with_mixing(size: int) -> int:
    n = math.isqrt(size + 1) - 1
    return n if n * (n + 2) == size else 0


# --- per-feature gates: Qwen4-exp


def _find_gated(module: str, leaves: Leaves) -> Iterator[Found]:
    """A norm (n·D), a low-rank pair (r, n·D) and (n·D, r), write gates (n, n·D).

    A gated adapter has these shapes too, so the names must speak of hyper-connections.
    """
    shapes = sorted((leaf.shape for leaf in leaves.values()), key=len)
    if [len(shape) for shape in shapes] != [1, 2, 2, 2]:
        return
    inputs = shapes[0][0]
    down = [shape[0] for shape in shapes[1:] if shape[1] == inputs]
    up = [shape[1] for shape in shapes[1:] if shape[0] == inputs]
    if len(down) != 2 or len(up) != 1 or up[0] not in down or not GATED_NAMES.search(f"{module}.{[*leaves]}"):
        return
    down.remove(up[0])
    n = down[0]
    if n > 1 and inputs % n == 0:
        yield Found(module, n, inputs // n, {}, tuple(leaves.values()))


# --- AltUp: gemma3n


def _find_altup(module: str, leaves: Leaves) -> Iterator[Found]:
    """Prediction (n², n), correction (n, n) and a router (n, D) in one module."""
    matrices = {leaf.shape: leaf for leaf in leaves.values() if len(leaf.shape) == 2}
    for (rows, n), prediction in matrices.items():
        correction = matrices.get((n, n))
        routers = [leaf for shape, leaf in matrices.items() if shape[0] == n and shape[1] > rows]
        if n > 1 and rows == n * n and correction is not None and len(routers) == 1:
            roles = {"prediction": prediction, "correction": correction}
            unread = tuple(leaf for leaf in leaves.values() if leaf not in roles.values())
            yield Found(module, n, routers[0].shape[1], roles, unread)


# --- alpha and beta: lucidrains' HC, mHC, mHCv2, fractions and branch inputs


FREE_GATES = {"dynamic_alpha_scale": "gate_alpha", "dynamic_beta_scale": "gate_post"}
CONSTRAINED_GATES = {
    "pre_branch_scale": "gate_pre",
    "residual_scale": "gate_res",
    "h_post_scale": "gate_post",
}


def _find_width(constrained: bool) -> Callable[[str, Leaves], Iterator[Found]]:
    """Static alpha (n·f, v·f + n·f), with a static beta of as many rows or none; the scales tell HC from mHC."""
    names = {
        "static_alpha": "alpha",
        "static_beta": "beta",
        **(CONSTRAINED_GATES if constrained else FREE_GATES),
    }

    def find(module: str, leaves: Leaves) -> Iterator[Found]:
        if constrained != ("residual_scale" in leaves) or not _alpha_fits(leaves):
            return
        rows, fractions = leaves["static_alpha"].shape[0], _fractions(leaves)
        yield Found(
            module,
            rows // (fractions or 1),
            _width(leaves, fractions or 1),
            {role: leaves[name] for name, role in names.items() if name in leaves},
            tuple(leaf for name, leaf in leaves.items() if name.startswith("dynamic_") and name not in names),
            fractions,
        )

    return find


def _alpha_fits(leaves: Leaves) -> bool:
    alpha, beta = leaves.get("static_alpha"), leaves.get("static_beta")
    if alpha is None or len(alpha.shape) != 2 or not 1 < alpha.shape[0] < alpha.shape[1]:
        return False
    return beta is None or alpha.shape[0] in (math.prod(beta.shape), beta.shape[0])


def _fractions(leaves: Leaves) -> int:
    """How many fractions a stream has; 0 where the shapes do not tell."""
    rows, columns = leaves["static_alpha"].shape
    beta, dynamic = (leaves.get(name) for name in ("static_beta", "dynamic_beta_fn"))
    if beta is None:
        return 1 if columns - rows == 1 else 0
    if len(beta.shape) == 3:
        return beta.shape[1]
    return dynamic.shape[1] if len(beta.shape) == 1 and dynamic and len(dynamic.shape) == 2 else 1


def _width(leaves: Leaves, fractions: int) -> int | None:
    """Width of a stream, from the projection (…, D/f, columns)."""
    dynamic, columns = leaves.get("dynamic_alpha_fn"), leaves["static_alpha"].shape[1]
    if dynamic is None or len(dynamic.shape) < 2 or dynamic.shape[-1] != columns:
        return None
    return dynamic.shape[-2] * fractions


# --- all of them

HC_EPS = {"hc_eps": 1e-6}
FAMILIES = (
    Family(
        "mhc",
        "returned",
        "a projection (n(n+2), n·D) with a bias (n(n+2)) and 3 scales",
        _projected(3, _streams_with_mixing),
        {"hc_sinkhorn_iters": float(SINKHORN_ROUNDS), **HC_EPS},
        constrained=True,
    ),
    Family(
        "independent_hc",
        "returned",
        "a projection (2n, n·D) with a bias (2n) and 2 scales",
        _projected(2, lambda size: size // 2 if size % 2 == 0 else 0),
        {"hc_magnitude": 2.0, **HC_EPS},
        learns_mixing=False,
    ),
    Family(
        "mhc",
        "width",
        "static_alpha (n, n + 1) with static_beta (n) and residual_scale",
        _find_width(constrained=True),
        constrained=True,
    ),
    Family(
        "hc",
        "width",
        "static_alpha (n, n + 1) with static_beta (n), as fractions too",
        _find_width(constrained=False),
    ),
    Family(
        "gated_streams",
        "gated",
        "hyper-connection gates (n, n·D) beside a low-rank pair (r, n·D), (n·D, r)",
        _find_gated,
        learns_mixing=False,
    ),
    Family(
        "altup",
        "altup",
        "AltUp's prediction (n², n), correction (n, n) and router (n, D)",
        _find_altup,
        {"altup_active_idx": 0.0},
        learns_mixing=False,
    ),
)
HEAD = Family(
    "head",
    "returned",
    "a projection (n, n·D) with a bias (n) and 1 scale, beside connections of such streams",
    _projected(1, lambda size: size),
    HC_EPS,
    learns_mixing=False,
)


def find_connections(tensors: Mapping[str, StoredTensor]) -> list[tuple[Family, Found]]:
    """Connections among tensors, in the order of depth, and the heads that read their streams.

    Parameters
    ----------
    tensors : Mapping of str to StoredTensor
        By full name.

    Returns
    -------
    list of (Family, Found)
        Heads are last.
    """
    modules = _by_module(tensors)
    found = [(family, one) for family in FAMILIES for one in _found(family, modules)]
    streams = {(one.streams, one.width) for _, one in found}
    heads = [(HEAD, one) for one in _found(HEAD, modules) if (one.streams, one.width) in streams]
    return sorted(found, key=lambda pair: _order(pair[1].module)) + heads


def _by_module(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        modules[module][leaf] = tensor
    return modules


def _found(family: Family, modules: Mapping[str, Leaves]) -> Iterator[Found]:
    for module, leaves in modules.items():
        yield from family.find(module, leaves)


@dataclass(frozen=True)
class Place:
    """Where in the network a module is."""

    chain: str
    layer: int
    branch: str


def place_of(module: str, inside: Sequence[str] = ()) -> Place:
    """Chain, layer and branch of a connection, from the words of its path or of what it wraps.

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
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    own = parts if at is None else parts[at + 1 :]
    branch = next((found for text in (*reversed(own), *inside) if (found := _branch(text))), "block")
    return Place("", -1, branch) if at is None else Place(".".join(parts[:at]), int(parts[at]), branch)


def _branch(text: str) -> str:
    return next((branch for branch, words in BRANCHES if words.search(text)), "")


def _order(module: str) -> tuple[Any, ...]:
    ranks = {branch: rank for rank, (branch, _) in enumerate(BRANCHES)}
    place = place_of(module)
    numbers = tuple(int(part) for part in module.split(".") if part.isdigit())
    return place.chain, numbers, ranks.get(place.branch, len(ranks)), module
