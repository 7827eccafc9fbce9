"""AltUp connections: X' = P + c ⊗ (F − P_a), with the prediction P = (I + C) X and its active row a.

Shapes: n stream (outermost, as the module keeps them), B batch, T token, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.detection import ConnectionError  # the field's word
from depthscope.probes.connections.tensor_watch import Explanation, Watch, explaining, few_of, mixing


def altup_watch(x: torch.Tensor) -> Watch:
    """A watch for AltUp's prediction coefficients (B, T, n, n) and correction coefficients (…, n).

    Parameters
    ----------
    x : Tensor
        Streams (n, B, T, D), or what the branch gave (B, T, D).

    Returns
    -------
    Watch
    """
    lead = tuple(x.shape[-3:-1])

    def accept(shape: tuple[int, ...]) -> bool:
        square = len(shape) == 4 and shape[:2] == lead and shape[2] == shape[3]
        vector = len(shape) in (3, 4) and (
            shape[:2] == lead or shape[1:3] == lead
        )  # (B, T, n) or (n, B, T[, 1])
        return (square or vector) and shape[-1] <= 64

    return Watch(accept)


def read_altup(x: torch.Tensor, predicted: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """The prediction's matrix I + C (B, T, N, N), destination by source.

    Parameters
    ----------
    x, predicted : Tensor
        (n, B, T, D): what ``predict`` was given and gave.
    seen : list of Tensor
        What it computed.

    Returns
    -------
    Tensor
    """
    n = x.shape[0]
    streams, goal = x.detach().movedim(0, 2), predicted.detach().movedim(0, 2)
    eye = torch.eye(n, device=x.device)
    squares = [t for t in seen if t.ndim == 4 and tuple(t.shape[-2:]) == (n, n)]
    whole = [eye + m.float() for t in squares for m in (t, t.mT)]
    found = explaining(((matrix, mixing(matrix, streams)) for matrix in whole), goal)
    if found is None:
        raise ConnectionError(
            "an AltUp module computes no coefficients that explain its prediction; this version of it is not known"
        )
    return found


def read_correction(
    matrix: torch.Tensor,
    predicted: torch.Tensor,
    branch_out: torch.Tensor,
    corrected: torch.Tensor,
    seen: list[torch.Tensor],
) -> Parts:
    """The parts of an AltUp connection: H_res = (I − c e_aᵀ)(I + C), H_post = c, H_pre = row a of I + C.

    Parameters
    ----------
    matrix : Tensor
        I + C, (B, T, N, N).
    predicted, corrected : Tensor
        (n, B, T, D): what ``correct`` was given and gave.
    branch_out : Tensor
        (B, T, D), the branch's output.
    seen : list of Tensor
        What ``correct`` computed.

    Returns
    -------
    Parts
        ``mix`` destination by source.
    """
    n = len(predicted)
    prediction, goal = predicted.detach().movedim(0, 2), corrected.detach().movedim(0, 2)
    branch = branch_out.detach()
    vectors = [v for t in seen for v in _as_vectors(t, tuple(branch.shape[:2]), n)]
    best = explaining(
        (((active, v), _innovation(active, v, prediction, branch)) for active in range(n) for v in vectors),
        goal - prediction,
    )
    if best is None:
        raise ConnectionError(
            "an AltUp module computes no coefficients that explain its correction; this version of it is not known"
        )
    active, write = best
    row = matrix[..., active, :]
    mix = matrix - write.float().unsqueeze(-1) * row.unsqueeze(-2)
    return Parts(
        mix,
        row.unsqueeze(-2),
        write.unsqueeze(-1),
        prediction[:, :, active].unsqueeze(2),
        branch.unsqueeze(2),
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
    if tuple(tensor.shape) == (*lead, n):
        yield tensor
    if tensor.numel() == math.prod(lead) * n and tuple(tensor.shape[:3]) == (n, *lead):
        yield tensor.reshape(n, *lead).movedim(0, -1)
