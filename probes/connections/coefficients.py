"""What are the coefficients of one connection call? Their container, and up to which error they count as its own.

A connection passes n streams X of width D by a branch F with three sets of weights:

    X' = H_res X + H_post ⊗ F(H_pre · X)            (mHC, arXiv 2512.24880, Eq. 3)

Shapes: B batch, T token, N stream, V view (a branch input; mostly one), D feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch

from depthscope.diagnostics.errors import InputError

# By the type of the states; heuristics. float32: about a thousand roundings, for the sums of a connection. Half types:
# three, since the proof rounds where the model rounds. float64: connections compute their weights in float32 there too.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class StreamConnectionError(InputError):
    """A stream connection that cannot be read."""


class ReconstructionError(StreamConnectionError):
    """The captured parts of a connection do not give the next state."""


class Weights:
    """Tensors of one connection call, all of them (B, T, …)."""

    def at(self, index: torch.Tensor | int) -> Self:
        """Those of some sequences."""
        return self.each(lambda tensor: tensor[index])

    def sampled(self, rows: torch.Tensor) -> Self:
        """Copies of some sequences, in float32 on the CPU."""
        return self.each(lambda tensor: tensor.detach()[rows].to("cpu", torch.float32))

    def detached(self) -> Self:
        """Copies in float32 that share no memory with the model's own tensors."""
        return self.each(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with one change made to every tensor."""
        tensors = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(None if tensor is None else change(tensor) for tensor in tensors))


@dataclass
class DepthWeights(Weights):
    """The weights of one connection over depth: h_v = Σ_j read_vj v_j, X_{k+1} = Σ_j carry_j v_j + scale · F_k.

    ``read``: (B, T, V, K + 1): of the embedding and of every branch's output in each input of the branch.
    ``carry``: (B, T, K + 1): of the embedding and of every branch's output in the next state, its own output left
    out.
    ``scale``: (B, T): of its own output in the next state.
    """

    read: torch.Tensor
    carry: torch.Tensor
    scale: torch.Tensor


@dataclass
class Parts(Weights):
    """The weights of one connection call, and what its branch took and returned.

    ``mix``: (B, T, N, N), destination by source; None where nothing mixes.
    ``read``: H_pre, (B, T, V, N); None where no scalar read weights exist, or where they are unknown.
    ``write``: H_post, (B, T, N, V).
    ``branch_in``: (B, T, V, D).
    ``branch_out``: (B, T, V, D).
    ``constant``: (B, T, N, D): what else is added to the next state, which was not computed from the streams.
    """

    mix: torch.Tensor | None
    read: torch.Tensor | None
    write: torch.Tensor
    branch_in: torch.Tensor
    branch_out: torch.Tensor
    constant: torch.Tensor | None = None


def per_token(tensor: torch.Tensor, tail: tuple[int, ...], batch: int, tokens: int) -> Iterator[torch.Tensor]:
    """A tensor as (B, T, *tail) in the ways that its shape allows; a constant one is expanded."""
    lead, size, shape = (batch, tokens), math.prod(tail), tuple(tensor.shape)
    if tensor.numel() == size:
        yield tensor.reshape(tail).expand(*lead, *tail)
    elif tensor.numel() == math.prod(lead) * size:
        if shape[0] in (lead[0], math.prod(lead)):
            yield tensor.reshape(*lead, *tail)
        if shape[:2] == lead[::-1]:
            yield tensor.reshape(*lead[::-1], *tail).transpose(0, 1)
        if shape == (*tail, *lead):
            yield tensor.movedim((-2, -1), (0, 1))


def spread(count: int, most: int) -> torch.Tensor:
    """At most ``most`` indices below ``count``, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long()


def relative_error(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """‖difference‖ / ‖reference‖ in float64; the plain norm where the reference is zero."""
    scale = torch.linalg.vector_norm(reference.detach().double())
    error = torch.linalg.vector_norm(difference.detach().double())
    return float(error / scale) if scale > 0 else float(error)


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a reconstruction counts as proof, by the precision of the states."""
    return TOLERANCE.get(dtype, 1e-4)
