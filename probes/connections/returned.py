"""Returned connections: their weights from what the module returned, H_pre from what it computed inside.

Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from depthscope.probes.connections.coefficients import Parts, relative_error, spread, tolerance
from depthscope.probes.connections.detection import STREAM_AXES, ConnectionError, Roles, Site, find_roles
from depthscope.probes.connections.tensor_watch import SELECTING_TOKENS, Watch, explaining, few_of, mixing
from depthscope.probes.model.autocast import compute_dtype
from depthscope.probes.model.layout import canonical


def returned_watch(x: torch.Tensor, site: Site) -> Watch:
    """A watch for the weights that a returned connection computes and keeps to itself.

    Parameters
    ----------
    x : Tensor
        Its input.
    site : Site
        What it is.

    Returns
    -------
    Watch
    """
    n = site.num_streams
    lead = _lead(x, site)
    shapes = {(*lead, *tail) for tail in ((n,), (n, 1), (1, n), (n, n))}
    return Watch(shapes.__contains__)


def _lead(x: torch.Tensor, site: Site) -> tuple[int, ...]:
    axis = STREAM_AXES.get(site.layout)
    return tuple(size for position, size in enumerate(x.shape[:-1]) if position != axis)


def read_returned(
    site: Site, x: torch.Tensor, output: Any, rows: torch.Tensor, seen: Callable[[], list[torch.Tensor]]
) -> tuple[Parts | None, Parts]:
    """Read a returned connection: for the sampled rows all parts, for all tokens what it returned.

    Parameters
    ----------
    site : Site
        What the connection is.
    x : Tensor
        Its input.
    output : object
        What it returned.
    rows : Tensor
        Indices of the sampled sequences.
    seen : callable
        Gives the tensors that the connection computed inside, of the sampled sequences or of all.

    Returns
    -------
    sampled : Parts or None
        None where no sequence is sampled.
    whole : Parts
        Every token, ``read`` None.
    """
    roles = find_roles(x, output)
    if roles is None:
        raise ConnectionError(
            "a connection returned other shapes than in the first forward; it cannot be followed"
        )
    streams = canonical(x, site.layout, batch_size=_batch(x, site), num_streams=site.num_streams)
    vectors = [_per_token(v, streams, (site.num_streams,)) for v in roles.vectors]
    collapsed = (
        None if roles.collapsed is None else roles.collapsed.reshape(*streams.shape[:2], 1, roles.width)
    )
    at = _Rows(streams, collapsed, rows)
    number, read = _told_read(vectors, at)
    write = vectors[-1 if number is None else next(i for i in range(len(vectors)) if i != number)]
    mix = _returned_mix(roles, streams, seen)
    if collapsed is None:
        collapsed = torch.einsum("btn,btnd->btd", vectors[0], streams.to(vectors[0].dtype)).unsqueeze(2)
        number, read = 0, vectors[0][rows]
    whole = Parts(mix, None, write.unsqueeze(-1), collapsed)
    if not len(rows):
        return None, whole
    if read is None and not site.reads_features:
        read = _watched_read(at, seen())
    sampled = whole.at(rows)
    sampled.read = None if read is None else read.unsqueeze(-2)
    return sampled, whole


@dataclass
class _Rows:
    """The sampled sequences of a connection's input and of its branch input."""

    streams: torch.Tensor
    collapsed: torch.Tensor | None
    rows: torch.Tensor

    @property
    def x(self) -> torch.Tensor:
        return self.streams[self.rows]

    @property
    def branch_in(self) -> torch.Tensor | None:
        return None if self.collapsed is None else self.collapsed[self.rows].squeeze(2)


def _batch(x: torch.Tensor, site: Site) -> int:
    return x.shape[1] if site.layout.startswith("N B") else x.shape[0]


def _per_token(weight: torch.Tensor, streams: torch.Tensor, tail: tuple[int, ...]) -> torch.Tensor:
    lead = tuple(streams.shape[:2])
    wanted = (*lead, *tail)
    return (
        weight.reshape(wanted) if weight.numel() == math.prod(wanted) else weight.reshape(tail).expand(wanted)
    )


def _told_read(vectors: list[torch.Tensor], at: _Rows) -> tuple[int | None, torch.Tensor | None]:
    """Which of the returned vectors is H_pre: the one that collapses the streams to the branch's input."""
    if at.branch_in is None or len(vectors) < 2 or not len(at.rows):
        return None, None
    errors = [read_error(at.x, vector[at.rows], at.branch_in) for vector in vectors]
    best = min(range(len(errors)), key=errors.__getitem__)
    if errors[best] > tolerance(compute_dtype(at.streams)):
        return None, None
    return best, vectors[best][at.rows]


def _returned_mix(
    roles: Roles, streams: torch.Tensor, seen: Callable[[], list[torch.Tensor]]
) -> torch.Tensor | None:
    n = roles.num_streams
    if roles.mix is not None:
        return _per_token(roles.mix, streams, (n, n))
    if roles.mixed is None:
        return None
    lead = streams.shape[:2]
    mixed = canonical(roles.mixed, roles.layout, batch_size=lead[0], num_streams=n)
    few = spread(lead[0] * lead[1], 8 * SELECTING_TOKENS).to(streams.device)
    before = few_of(streams, few)
    if relative_error(few_of(mixed, few) - before, before) <= tolerance(compute_dtype(streams)):
        return None
    candidates = [t.reshape(*lead, n, n) for t in seen() if t.numel() == mixed[..., 0].numel() * n]
    found = explaining(((m, mixing(m, streams)) for t in candidates for m in (t, t.mT)), mixed)
    if found is None:
        raise ConnectionError(
            "a connection returns its mixed streams, but none of the matrices that it computes explains them"
        )
    return found


def _watched_read(at: _Rows, seen: list[torch.Tensor]) -> torch.Tensor:
    """H_pre (K, T, N) among the tensors that the module computed, else by least squares."""
    x, branch_in = at.x, at.branch_in
    assert branch_in is not None
    candidates = []
    for tensor in seen:
        if tensor.numel() == x[..., 0].numel():
            candidates.append(tensor.reshape(x.shape[:-1]))
        elif tensor.numel() == at.streams[..., 0].numel():
            candidates.append(tensor.reshape(at.streams.shape[:-1])[at.rows])
    fits = [(read_error(x, read, branch_in), read) for read in candidates]
    error, best = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
    found = best is not None and error <= tolerance(compute_dtype(x))
    return best if best is not None and found else least_squares_read(x, branch_in)


def read_error(x: torch.Tensor, read: torch.Tensor, branch_in: torch.Tensor) -> float:
    """Relative error of Σ_j read_j X_j against the branch's input; on a spread of the tokens."""
    lead = tuple(x.shape[:-2])
    few = torch.unravel_index(spread(math.prod(lead), 8 * SELECTING_TOKENS).to(x.device), lead)
    goal = branch_in[few].double()
    value = torch.einsum("kn,knd->kd", read[few].double(), x[few].double())
    return relative_error(value - goal, goal)


def least_squares_read(x: torch.Tensor, branch_in: torch.Tensor) -> torch.Tensor:
    """The smallest read weights that give the branch's input; exact where the streams are independent.

    Parameters
    ----------
    x : Tensor
        Streams, (..., N, D).
    branch_in : Tensor
        (..., D).

    Returns
    -------
    Tensor
        (..., N). By pseudo-inverse, since the streams may be copies of one another; NaN where they are not finite.
    """
    known = (x.isfinite().all(-1).all(-1) & branch_in.isfinite().all(-1)).unsqueeze(-1)
    finite = torch.where(known.unsqueeze(-1), x, 0.0).double()
    inverse = torch.linalg.pinv(finite.mT, rtol=1e-6)
    found = (inverse @ torch.where(known, branch_in, 0.0).double().unsqueeze(-1)).squeeze(-1).float()
    return torch.where(known, found, torch.nan)
