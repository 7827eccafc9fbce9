"""What takes the place of a mixing matrix, or of a state? Matrices are (B, T, N, N), states (B, T, N, D), masks (B, T)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from depthscope.probes.interventions.errors import InterventionError

# Sinkhorn's steps converge geometrically; where they do not within so many, the limit has zeros that are reached like 1/k.
SINKHORN_STEPS, SINKHORN_ERROR = 10_000, 1e-6


def identity_matrix(mix: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The identity, at every token."""
    return torch.eye(mix.shape[-1], dtype=mix.dtype).expand_as(mix)


def uniform_matrix(mix: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """J/n, at every token."""
    return torch.full_like(mix, 1 / mix.shape[-1])


def mean_matrix(mix: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over all real tokens of all sequences."""
    real = mix.flatten(0, 1) if mask is None else mix[mask.cpu()]
    return real.mean(0).expand_as(mix)


def sinkhorn_limit(mix: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The doubly stochastic matrix that rows and columns normalised in turn converge to, token by token.

    Scaling rows and columns does not move it, so the limit from H_res is the limit from its logits.

    Raises InterventionError: For matrices with an entry that is not positive, and where the steps do not converge.
    """
    if bool((mix <= 0).any()):
        raise InterventionError(
            f"sinkhorn: H_res has entries down to {float(mix.min()):.3g}; Sinkhorn's steps need positive ones. Take identity, "
            "uniform or mean"
        )
    limit = mix
    for _ in range(SINKHORN_STEPS):
        limit = limit / limit.sum(-2, keepdim=True)
        limit = limit / limit.sum(-1, keepdim=True)
        if float((limit.sum(-2) - 1).abs().max()) <= SINKHORN_ERROR:
            return limit
    raise InterventionError(
        f"sinkhorn: after {SINKHORN_STEPS} steps the column sums are still off by "
        f"{float((limit.sum(-2) - 1).abs().max()):.1e}; the entries of H_res differ by too many orders of magnitude"
    )


MATRICES: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "identity": identity_matrix,
    "uniform": uniform_matrix,
    "mean": mean_matrix,
    "sinkhorn": sinkhorn_limit,
}
"""What takes the place of H_res (B, T, N, N), by the kind of the experiment."""


def merged_tokens(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the real tokens of each sequence, at all of them."""
    real = _real(state, mask)
    mean = (state.double() * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.where(real, mean.to(state.dtype), state)


def without_mean(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What differs from the mean over the real tokens of all sequences."""
    real = _real(state, mask)
    mean = (state.double() * real).sum((0, 1), keepdim=True) / real.sum().clamp_min(1)
    return torch.where(real, (state.double() - mean).to(state.dtype), state)


def merged_streams(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of the streams, as each of them."""
    return state.mean(2, keepdim=True).expand_as(state).clone()


def _real(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens count, (B, T, 1, 1)."""
    real = torch.ones(state.shape[:2], dtype=torch.bool) if mask is None else mask
    return real.to(state.device)[:, :, None, None]


COLLAPSED: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "merge_tokens": merged_tokens,
    "without_mean": without_mean,
    "merge_streams": merged_streams,
}
"""What a collapse would leave of a state, by the kind of the experiment."""
