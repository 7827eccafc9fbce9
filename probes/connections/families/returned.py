"""Connections whose module returns its weights: transformers' mHC, independent HC and gated streams, and the like.

The module takes the streams X and returns the branch's input (…, D) and the write weights H_post (…, n), mostly with a mixing
matrix (…, n, n) or the mixed streams, in any order; the model itself writes X'. ``deepseek_v4`` is one.
Shapes: B batch, T token, N stream, D feature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import nn

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.probes.connections.coefficients import Parts, relative_error, spread, tolerance
from depthscope.probes.connections.family import ForwardFamily, Seen, Site, StreamConnectionError
from depthscope.probes.connections.read_weights import READ_TOKENS, find_read_weights
from depthscope.probes.connections.roles import STREAM_AXES, Roles, find_roles
from depthscope.probes.connections.tensor_watch import Watch, explaining, few_of, mixing
from depthscope.probes.connections.weight_pattern import (
    SINKHORN_ROUNDS,
    FoundTensors,
    Leaves,
    Settings,
    StaticWeights,
    Values,
    WeightPattern,
)
from depthscope.probes.model.layout import canonical
from depthscope.probes.model.user_modes import compute_dtype

# --- in a forward


def detect(module: nn.Module, x: torch.Tensor, output: Any) -> Site | None:
    """A connection where the outputs have the shapes of its weights."""
    roles = find_roles(x, output)
    if roles is None:
        return None
    # Independent hyper-connections return the streams unmixed, in the place where others return them mixed.
    unmixed = roles.mixed is not None and torch.equal(roles.mixed.detach(), x.detach())
    mixes = roles.mix is not None or (roles.mixed is not None and not unmixed)
    reads_features = roles.layout.endswith("(N D)")
    unmixed_family = "gated" if reads_features else "independent_hc"
    return Site(
        style=FAMILY.name,
        family="hc" if mixes else unmixed_family,
        num_streams=roles.num_streams,
        layout=roles.layout,
        branch_shape=(*roles.lead, roles.width),
        mixes=mixes,
        reads_features=reads_features,
    )


def watch(site: Site, x: torch.Tensor) -> Watch:
    """A watch for read weights (…, N) and matrices (…, N, N), which a module may compute and not return."""
    n, axis = site.num_streams, STREAM_AXES.get(site.layout)
    lead = tuple(size for position, size in enumerate(x.shape[:-1]) if position != axis)
    shapes = {(*lead, *tail) for tail in ((n,), (n, 1), (1, n), (n, n))}
    return Watch(shapes.__contains__)


def read(site: Site, x: torch.Tensor, output: Any, seen: Seen) -> Parts:
    """The weights by their roles; of several vectors the one that reads the branch input is H_pre."""
    roles = find_roles(x, output)
    if roles is None:
        raise StreamConnectionError(
            "a connection returned other shapes than in the first forward; it cannot be followed"
        )
    streams = canonical(x, site.layout, batch_size=site.batch_size(x), num_streams=site.num_streams)
    vectors = [_per_token(vector, streams, (site.num_streams,)) for vector in roles.vectors]
    mix = _matrix(roles, streams, seen)
    # Without a branch input nothing shows which vector reads: H_pre is taken to come first, and the proof refuses
    # the other order.
    if roles.collapsed is None:  # the module returns H_pre, and the model reads with it
        pre, write = vectors[0], vectors[-1]
        branch_in = torch.einsum("btn,btnd->btd", pre, streams.to(pre.dtype))
    else:
        branch_in = roles.collapsed.reshape(*streams.shape[:2], roles.width)
        pre = find_read_weights(streams, branch_in, vectors) if len(vectors) > 1 else None
        write = vectors[-1] if pre is None else next(v for v in vectors if v is not pre)
    return Parts(mix, None if pre is None else pre.unsqueeze(-2), write.unsqueeze(-1), branch_in.unsqueeze(2))


def _per_token(weight: torch.Tensor, streams: torch.Tensor, tail: tuple[int, ...]) -> torch.Tensor:
    """A weight (B, T, *tail); a constant one is expanded."""
    shape = (*streams.shape[:2], *tail)
    if weight.numel() == math.prod(shape):
        return weight.reshape(shape)
    return weight.reshape(tail).expand(shape)


def _matrix(roles: Roles, streams: torch.Tensor, seen: Seen) -> torch.Tensor | None:
    """H_res: returned, or the computed matrix that explains the mixed streams; None where nothing mixes."""
    n, lead = roles.num_streams, streams.shape[:2]
    if roles.mix is not None:
        return _per_token(roles.mix, streams, (n, n))
    if roles.mixed is None:
        return None
    mixed = canonical(roles.mixed, roles.layout, batch_size=lead[0], num_streams=n)
    few = spread(lead.numel(), READ_TOKENS).to(streams.device)
    before = few_of(streams, few)
    # Unmixed streams need no matrix, which none of those that the module computes would explain.
    if relative_error(few_of(mixed, few) - before, before) <= tolerance(compute_dtype(streams)):
        return None
    matrices = [t.reshape(*lead, n, n) for t in seen() if t.numel() == lead.numel() * n * n]
    found = explaining(((m, mixing(m, streams)) for t in matrices for m in (t, t.mT)), mixed)
    if found is None:
        raise StreamConnectionError(
            "a connection returns its mixed streams, but none of the matrices that it computes explains them"
        )
    return found


# --- in a weight file: one projection for all weights of a connection


def _projected(
    num_scales: int, streams_of: Callable[[int], int]
) -> Callable[[str, Leaves], Iterator[FoundTensors]]:
    """Finds a projection (k, n·D), a bias (k) and ``num_scales`` scales whose names have one stem; n = streams_of(k)."""

    def find(module: str, leaves: Leaves) -> Iterator[FoundTensors]:
        scales = {name: leaf for name, leaf in leaves.items() if leaf.shape == (num_scales,)}
        for scale_name, scale in scales.items():
            stem = scale_name.rpartition("_")[0]
            others = [leaf for name, leaf in leaves.items() if name.rpartition("_")[0] == stem]
            biases = [leaf for leaf in others if len(leaf.shape) == 1 and leaf is not scale]
            projections = [leaf for leaf in others if len(leaf.shape) == 2]
            for bias, projection in ((b, p) for b in biases for p in projections):
                n, inputs = streams_of(bias.shape[0]), projection.shape[1]
                # D > n excludes square projections of other layers, which have biases and scales too
                if projection.shape[0] == bias.shape[0] and n > 1 and inputs % n == 0 and inputs // n > n:
                    path = module if module and stem in ("", "hc") else f"{module}.{stem}".strip(".")
                    roles = {"base": bias, "scale": scale}
                    yield FoundTensors(path, n, inputs // n, roles, (projection,))

    return find


def _streams_with_matrix(size: int) -> int:
    """The n of n read weights, n write weights and an n × n matrix; 0 where size is not n² + 2n."""
    n = math.isqrt(size + 1) - 1
    return n if n * (n + 2) == size else 0


GATED_NAMES = re.compile(r"hyper|inject|\bhc_", re.IGNORECASE)


def _find_gated(module: str, leaves: Leaves) -> Iterator[FoundTensors]:
    """A norm (n·D), a low-rank pair (r, n·D) and (n·D, r), write gates (n, n·D), as in Qwen4-exp.

    A gated adapter has these shapes too, so the names must mention hyper-connections as well.
    """
    shapes = sorted((leaf.shape for leaf in leaves.values()), key=len)
    if [len(shape) for shape in shapes] != [1, 2, 2, 2]:
        return
    inputs = shapes[0][0]
    down = [shape[0] for shape in shapes[1:] if shape[1] == inputs]
    up = [shape[1] for shape in shapes[1:] if shape[0] == inputs]
    if len(down) != 2 or len(up) != 1 or up[0] not in down or not GATED_NAMES.search(f"{module}.{[*leaves]}"):
        return
    down.remove(up[0])  # the rank; the other one counts the streams
    n = down[0]
    if n > 1 and inputs % n == 0:
        yield FoundTensors(module, n, inputs // n, {}, tuple(leaves.values()))


def _weigh_mhc(found: FoundTensors, values: Values, settings: Settings) -> StaticWeights:
    n, eps = found.streams, settings["hc_eps"]
    pre, post, comb = np.split(values["base"], [n, 2 * n])
    logits = comb.reshape(n, n)  # source by destination, as in the module
    # The module adds eps to its softmax, then alternates column and row sums. Its first row sum is the softmax's own, so the
    # rounds of the kernel, which begin with rows, are the same ones.
    mixed = kernel.sinkhorn(
        np.log(softmax(logits, axis=-1) + eps), steps=int(settings["hc_sinkhorn_iters"]), last="column"
    )
    return StaticWeights(
        res=mixed.T,
        pre=expit(pre) + eps,
        post=2.0 * expit(post),
        biases={"pre": pre, "post": post, "res": logits.T},
        gates=dict(zip(("pre", "post", "res"), values["scale"].tolist(), strict=True)),
    )


def _weigh_independent(found: FoundTensors, values: Values, settings: Settings) -> StaticWeights:
    pre, post = np.split(values["base"], 2)
    eps = settings["hc_eps"]
    return StaticWeights(
        res=np.eye(found.streams),
        pre=expit(pre) + eps,
        post=settings["hc_magnitude"] * expit(post) + eps,
        biases={"pre": pre, "post": post},
        gates=dict(zip(("pre", "post"), values["scale"].tolist(), strict=True)),
    )


def _weigh_head(found: FoundTensors, values: Values, settings: Settings) -> StaticWeights:
    return StaticWeights(
        pre=expit(values["base"]) + settings["hc_eps"],
        biases={"pre": values["base"]},
        gates={"pre": float(values["scale"][0])},
    )


def _weigh_gated(found: FoundTensors, values: Values, settings: Settings) -> StaticWeights:
    return StaticWeights(
        res=np.eye(found.streams),
        post=np.ones(found.streams),
        note="gated streams have no biases: every read is per feature, every write 2 sigmoid(0) = 1 at a zero input",
    )


HC_EPS = {"hc_eps": 1e-6}

FAMILY = ForwardFamily(
    name="returned",
    constrains={
        "hc": "",
        "independent_hc": "H_res = I",
        "gated": "H_res = I; H_pre is a gate per feature",
    },
    detect=detect,
    watch=watch,
    read=read,
    weights=(
        WeightPattern(
            name="mhc",
            style="returned",
            looked_for="a projection (n(n+2), n·D) with a bias (n(n+2)) and 3 scales",
            find=_projected(3, _streams_with_matrix),
            weigh=_weigh_mhc,
            settings={"hc_sinkhorn_iters": float(SINKHORN_ROUNDS), **HC_EPS},
            constrained=True,
            # rows of the module's own matrix are sources: its last side, columns, are rows of H_res
            sinkhorn=lambda settings: {
                "sinkhorn_steps": int(settings["hc_sinkhorn_iters"]),
                "last": "row",
                "floor": settings["hc_eps"],
            },
        ),
        WeightPattern(
            name="independent_hc",
            style="returned",
            looked_for="a projection (2n, n·D) with a bias (2n) and 2 scales",
            find=_projected(2, lambda size: size // 2 if size % 2 == 0 else 0),
            weigh=_weigh_independent,
            settings={"hc_magnitude": 2.0, **HC_EPS},
            learns_mixing=False,
        ),
        WeightPattern(
            name="gated_streams",
            style="gated",
            looked_for="hyper-connection gates (n, n·D) with a low-rank pair (r, n·D), (n·D, r)",
            find=_find_gated,
            weigh=_weigh_gated,
            learns_mixing=False,
        ),
        WeightPattern(
            name="head",
            style="returned",
            looked_for="a projection (n, n·D) with a bias (n) and 1 scale, where connections of such streams are",
            find=_projected(1, lambda size: size),
            weigh=_weigh_head,
            settings=HC_EPS,
            learns_mixing=False,
            head=True,
        ),
    ),
)
