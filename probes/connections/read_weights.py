"""Which weights H_pre combine the streams to the branch's input? Those of the module, or the least-squares ones.

Shapes: … any leading axes, N stream, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch

from depthscope.probes.connections.coefficients import relative_error, spread, tolerance
from depthscope.probes.connections.tensor_watch import SELECTING_TOKENS
from depthscope.probes.model.user_modes import compute_dtype

# Heuristic. More than for a matrix, which every stream of a token tests: a vector has one equation for a token and feature.
READ_TOKENS = 8 * SELECTING_TOKENS
RANK_TOLERANCE = (
    1e-6  # relative singular value; a few float32 roundings, below which two streams count as copies
)


def read_error(x: torch.Tensor, read: torch.Tensor, branch_in: torch.Tensor) -> float:
    """Relative error of Σ_j read_j X_j against the branch input, on at most `READ_TOKENS` tokens."""
    lead = tuple(x.shape[:-2])
    few = torch.unravel_index(spread(math.prod(lead), READ_TOKENS).to(x.device), lead)
    goal = branch_in[few].double()
    value = torch.einsum("kn,knd->kd", read[few].double(), x[few].double())
    return relative_error(value - goal, goal)


def find_read_weights(
    x: torch.Tensor,
    branch_in: torch.Tensor,
    candidates: Iterable[torch.Tensor],
    unlike: torch.Tensor | None = None,
    tokens: int = READ_TOKENS,
) -> torch.Tensor | None:
    """The candidate that combines the streams to the branch input best, up to rounding.

    ``unlike``: weights (..., N) that are taken only where no others fit.
    ``tokens``: on how many tokens at most they are compared.
    """
    lead, limit = tuple(x.shape[:-2]), tolerance(compute_dtype(x))
    few = torch.unravel_index(spread(math.prod(lead), tokens).to(x.device), lead)
    goal, streams = branch_in[few].double(), x[few].double()
    fits: list[tuple[float, int, torch.Tensor]] = []
    for position, read in enumerate(candidates):
        error = relative_error(torch.einsum("kn,knd->kd", read[few].double(), streams) - goal, goal)
        if error <= limit:
            fits.append((error, position, read))
    fits.sort(key=lambda fit: fit[:2])
    for _, _, read in fits:
        if unlike is None or not torch.allclose(read.float(), unlike.float()):
            return read
    return fits[0][2] if fits else None


def still_reads(
    x: torch.Tensor, branch_in: torch.Tensor, read: torch.Tensor, unlike: torch.Tensor | None
) -> bool:
    """Whether weights that explained the branch input in the forward before explain it in this one, and are not H_post.

    Fewer tokens are compared than in the search, where others of the module's tensors may come near: here there is one. All is
    computed on the device, which is waited for once.

    ``unlike``: weights (..., N) that these must not be.
    """
    lead, limit = tuple(x.shape[:-2]), tolerance(compute_dtype(x))
    few = _spread_over(lead, SELECTING_TOKENS, x.device)
    goal = branch_in[few].double()
    size = torch.linalg.vector_norm(goal)
    error = torch.linalg.vector_norm((read[few].double().unsqueeze(-2) @ x[few].double()).squeeze(-2) - goal)
    fits = error <= limit * torch.where(size > 0, size, 1.0)
    if unlike is not None:  # by the limits of `torch.allclose`
        other = unlike.float()
        fits &= ((read.float() - other).abs() > 1e-8 + 1e-5 * other.abs()).any()
    return bool(fits)


@lru_cache(maxsize=16)
def _spread_over(lead: tuple[int, ...], most: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.unravel_index(spread(math.prod(lead), most).to(device), lead)


def least_squares_read(x: torch.Tensor, branch_in: torch.Tensor) -> torch.Tensor:
    """The smallest read weights that give the branch input; exact where the streams are independent.

    Returns: (..., N); NaN where the streams are not finite.
    """
    finite = (x.isfinite().all(-1).all(-1) & branch_in.isfinite().all(-1)).unsqueeze(-1)
    streams = torch.where(finite.unsqueeze(-1), x, 0.0).double()  # torch's SVD raises at NaN
    # by pseudo-inverse: streams may be copies of one another, as they are at the embedding
    inverse = torch.linalg.pinv(streams.mT, rtol=RANK_TOLERANCE)
    read = (inverse @ torch.where(finite, branch_in, 0.0).double().unsqueeze(-1)).squeeze(-1).float()
    return torch.where(finite, read, torch.nan)


def are_independent(x: torch.Tensor) -> torch.Tensor:
    """Whether the streams of a token are linearly independent, so that they determine what reads them: 1 or 0.

    Returns: (...); 0 where they are not finite.
    """
    finite = x.isfinite().all(-1).all(-1)
    streams = torch.where(finite[..., None, None], x, 0.0).double()  # torch's SVD raises at NaN
    return (torch.linalg.matrix_rank(streams, rtol=RANK_TOLERANCE) == x.shape[-2]).float()
