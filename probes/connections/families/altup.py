"""AltUp connections (arXiv 2301.13310), as in gemma3n: ``predict`` opens, ``correct`` closes.

    P = (I + C) X,    X' = P + c ⊗ (F(P_a) − P_a),    a the active stream

so that H_res = (I − c e_aᵀ)(I + C), H_post = c and H_pre is row a of I + C.
Shapes: n stream (outermost, as in the module), B batch, T token, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.family import MOST_STREAMS, PairedFamily, Site, StreamConnectionError
from depthscope.probes.connections.tensor_watch import (
    Explanation,
    Watch,
    WeightPlace,
    explaining,
    few_of,
    mixing,
)
from depthscope.probes.model.tensors import tensors_in

# --- in a forward


def detect(module: nn.Module, x: torch.Tensor, batch_size: int) -> Site | None:
    """Streams (n, B, T, D)."""
    if x.ndim == 4 and x.shape[1] == batch_size:
        return Site(style=FAMILY.name, family="altup", num_streams=x.shape[0], layout="N B T D")
    return None


def watch(site: Site, x: torch.Tensor) -> Watch:
    """A watch for C (B, T, n, n) and c (B, T, n) or (n, B, T[, 1]); x is the streams or the branch's output (B, T, D)."""
    lead = tuple(x.shape[-3:-1])

    def accept(shape: tuple[int, ...]) -> bool:
        square = len(shape) == 4 and shape[:2] == lead and shape[2] == shape[3]
        vector = len(shape) in (3, 4) and (shape[:2] == lead or shape[1:3] == lead)
        return (square or vector) and shape[-1] <= MOST_STREAMS

    return Watch(accept)


def read(
    site: Site,
    batch_size: int,
    x: torch.Tensor,
    result: Any,
    seen: list[torch.Tensor],
    place: WeightPlace | None,
) -> Parts:
    """I + C, destination by source, as what reads the n predictions; nothing is written before ``correct`` runs."""
    n = site.num_streams
    streams, predicted = x.detach().movedim(0, 2), result.detach().movedim(0, 2)
    eye = torch.eye(n, device=x.device)
    squares = [t for t in seen if t.ndim == 4 and tuple(t.shape[-2:]) == (n, n)]
    # A matrix and its transpose both pass through the module: the prediction decides which one is applied.
    matrices = [eye + m.float() for t in squares for m in (t, t.mT)]
    found = explaining([(matrix, mixing(matrix, streams)) for matrix in matrices], predicted, place=place)
    if found is None:
        raise StreamConnectionError(
            "an AltUp module computes no coefficients that explain its prediction; this version of it is not known"
        )
    return Parts(mix=None, read=found, write=torch.zeros_like(found[..., :1]), branch_in=predicted)


def close(
    site: Site, opened: Parts, branch_out: torch.Tensor, output: Any, seen: list[torch.Tensor]
) -> Parts:
    """The parts of the connection, with the active stream and c that explain the correction; the matrix is H_res."""
    assert opened.read is not None
    matrix, prediction, branch = opened.read, opened.branch_in, branch_out.detach()
    corrected = next(tensors_in(output)).detach().movedim(0, 2)
    n = site.num_streams
    vectors = [v for t in seen for v in _as_vectors(t, tuple(branch.shape[:2]), n)]
    # The active stream is not read from a setting, whose name may change: it is the one that explains the correction.
    best = explaining(
        [((active, v), _innovation(active, v, prediction, branch)) for active in range(n) for v in vectors],
        corrected - prediction,
    )
    if best is None:
        raise StreamConnectionError(
            "an AltUp module computes no coefficients that explain its correction; this version of it is not known"
        )
    active, write = best
    row = matrix[..., active, :]
    return Parts(
        mix=matrix - write.float().unsqueeze(-1) * row.unsqueeze(-2),
        read=row.unsqueeze(-2),
        write=write.unsqueeze(-1),
        branch_in=prediction[:, :, active].unsqueeze(2),
        branch_out=branch.unsqueeze(2),
    )


def _innovation(
    active: int, write: torch.Tensor, prediction: torch.Tensor, branch: torch.Tensor
) -> Explanation:
    """The correction c ⊗ (F − P_a)."""
    return lambda few: (
        few_of(write, few).unsqueeze(-1)
        * (few_of(branch, few) - few_of(prediction, few)[:, active]).unsqueeze(-2)
    )


def _as_vectors(tensor: torch.Tensor, lead: tuple[int, int], n: int) -> Iterator[torch.Tensor]:
    """A watched tensor as (B, T, n), in each order of axes; with n = B or T both may fit."""
    if tuple(tensor.shape) == (*lead, n):
        yield tensor
    if tensor.numel() == math.prod(lead) * n and tuple(tensor.shape[:3]) == (n, *lead):
        yield tensor.reshape(n, *lead).movedim(0, -1)


FAMILY = PairedFamily(
    name="altup",
    constrains={"altup": ""},
    opens="predict",
    closes="correct",
    branch_argument=1,
    detect=detect,
    watch=watch,
    read=read,
    watch_closing=watch,
    close=close,
    rewrites_output=True,  # gemma3n adds its per-layer embedding to the corrected streams in place
)
