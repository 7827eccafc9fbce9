"""Which outputs of a module are the weights of a connection? Told by their shapes, in whatever order they come.

Shapes: B batch, T token, N stream, D feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from depthscope.probes.connections.family import MOST_STREAMS
from depthscope.probes.model.tensors import tensors_in

SPAN_TOKENS = 64  # tokens on which the position of the stream axis is decided where the shapes leave it open; a heuristic
STREAM_AXES = {"B T N D": 2, "B N D": 1, "B N T D": 1, "N B T D": 0}


@dataclass(frozen=True)
class Roles:
    """The outputs of a forward connection by their roles.

    Parameters
    ----------
    layout : str
        Of the streams.
    lead : tuple of int
        (B, T): the shape of the streams without the axes of streams and features.
    num_streams, width : int
        N and D.
    collapsed : Tensor or None
        The branch input, (B, T, D).
    vectors : tuple of Tensor
        Read and write weights, (B, T, N) or constant ones.
    mix : Tensor or None
        The mixing matrix, (B, T, N, N).
    mixed : Tensor or None
        The mixed streams, where they are returned in place of the matrix.
    """

    layout: str
    lead: tuple[int, ...]
    num_streams: int
    width: int
    collapsed: torch.Tensor | None
    vectors: tuple[torch.Tensor, ...]
    mix: torch.Tensor | None
    mixed: torch.Tensor | None


def find_roles(x: torch.Tensor, output: Any) -> Roles | None:
    """Sort the outputs of a module by the roles that a connection's outputs have.

    Returns: None where these are not the outputs of a connection.
    """
    outputs = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    by_axis = [_roles_for_axis(x, outputs, layout, axis) for layout, axis in STREAM_AXES.items()]
    matches = [roles for roles in by_axis if roles is not None]
    if not matches:
        return _merged_roles(x, outputs)
    # With as many tokens or sequences as streams several axes fit by shape; the branch input is a combination of the
    # streams, so the right axis is the one whose vectors span it.
    return matches[0] if len(matches) == 1 else min(matches, key=lambda roles: _distance_to_span(x, roles))


def _distance_to_span(x: torch.Tensor, roles: Roles) -> float:
    """Relative distance of the branch input from the span of the streams, for the axis that these roles assume."""
    if roles.collapsed is None:
        return 0.0
    streams = x.detach().movedim(STREAM_AXES[roles.layout], -2).flatten(0, -3)[:SPAN_TOKENS].double()
    goal = roles.collapsed.detach().flatten(0, -2)[:SPAN_TOKENS].double().unsqueeze(-1)
    read = torch.linalg.pinv(streams.mT) @ goal
    return float((streams.mT @ read - goal).norm() / goal.norm().clamp_min(torch.finfo(goal.dtype).tiny))


def _roles_for_axis(x: torch.Tensor, outputs: list[torch.Tensor], layout: str, axis: int) -> Roles | None:
    if x.ndim != len(layout.split()):
        return None
    n, width = x.shape[axis], x.shape[-1]
    lead = tuple(size for position, size in enumerate(x.shape[:-1]) if position != axis)
    if not 1 < n <= MOST_STREAMS or n == width:
        return None
    collapsed = [t for t in outputs if tuple(t.shape) == (*lead, width)]
    mixed = [t for t in outputs if t.shape == x.shape]
    # (B, T) itself may be (N, N) or end in N; then a shape alone does not separate vectors from matrices
    vectors = [t for t in outputs if fits(t, lead, (n,), (n, 1), (1, n)) and tuple(t.shape) != (*lead, n, n)]
    matrices = [t for t in outputs if fits(t, lead, (n, n)) and tuple(t.shape) != (*lead, n)]
    if not vectors or not (collapsed or matrices):
        return None
    # In three axes (B N D) a gated layer returns such shapes too: a matrix is required. Without a branch input one vector
    # must be H_pre and another H_post.
    if (x.ndim == 3 and not matrices) or (not collapsed and len(vectors) < 2):
        return None
    return Roles(
        layout=layout,
        lead=lead,
        num_streams=n,
        width=width,
        collapsed=collapsed[0] if collapsed else None,
        vectors=tuple(vectors),
        mix=matrices[0] if matrices else None,
        mixed=mixed[0] if mixed and not matrices else None,
    )


def _merged_roles(x: torch.Tensor, outputs: list[torch.Tensor]) -> Roles | None:
    """A branch input (…, D) and write gates (…, n) from streams merged into one axis of n·D, as in Qwen4-exp."""
    lead, merged = tuple(x.shape[:-1]), x.shape[-1]
    widths = {t.shape[-1] for t in outputs if tuple(t.shape[:-1]) == lead and 1 < t.shape[-1] < merged}
    for width in sorted(widths, reverse=True):  # n and D both divide n·D: the width is the larger of the two
        n, rest = divmod(merged, width)
        vectors = tuple(t for t in outputs if tuple(t.shape) == (*lead, n))
        mixed = [t for t in outputs if t.shape == x.shape]
        if not rest and n != width and vectors and mixed:
            collapsed = next(t for t in outputs if tuple(t.shape) == (*lead, width))
            return Roles("B T (N D)", lead, n, width, collapsed, vectors, None, mixed[0])
    return None


def fits(tensor: torch.Tensor, lead: tuple[int, ...], *tails: tuple[int, ...]) -> bool:
    """Whether a tensor is one weight per token, or one constant weight for all of them.

    ``tails``: the shapes that one token's weight may have.
    """
    shape = tuple(tensor.shape)
    return any(
        shape == (*lead, *tail) or (shape[-len(tail) :] == tail and set(shape[: -len(tail)]) <= {1})
        for tail in tails
    )
