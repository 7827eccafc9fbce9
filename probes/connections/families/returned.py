"""Connections whose module returns its weights: transformers' mHC, independent HC and gated streams, and the like.

The module takes the streams X and returns the branch's input (…, D) and the write weights H_post (…, n), mostly with a mixing
matrix (…, n, n) or the mixed streams, in any order; the model itself writes X'. ``deepseek_v4`` is one.
Shapes: B batch, T token, N stream, D feature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts, relative_error, spread, tolerance
from depthscope.probes.connections.family import ForwardFamily, Seen, Site, StreamConnectionError
from depthscope.probes.connections.read_weights import READ_TOKENS, find_read_weights
from depthscope.probes.connections.roles import STREAM_AXES, Roles, find_roles
from depthscope.probes.connections.tensor_watch import Watch, explaining, few_of, mixing
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
    found = explaining([(m, mixing(m, streams)) for t in matrices for m in (t, t.mT)], mixed)
    if found is None:
        raise StreamConnectionError(
            "a connection returns its mixed streams, but none of the matrices that it computes explains them"
        )
    return found


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
)
