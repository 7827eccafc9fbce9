"""Were all coefficients of the connections constant? The derivative of each next state is compared with that of the formula.

    X' = H_res X + H_post ⊗ F(H_pre · X),    Jᵀu = H_resᵀ u + H_preᵀ F'ᵀ (H_post · u)

Shapes: B batch, T token, N stream, V view (a branch input), D feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from depthscope.probes.connections.coefficients import as_views, relative_error, tolerance
from depthscope.probes.connections.family import StreamConnectionError
from depthscope.probes.connections.reading import canonical_streams
from depthscope.probes.jacobian.frozen_routing import (
    INSTEAD,
    FrozenCall,
    FrozenRouting,
    orientations,
    rearranged,
)
from depthscope.probes.structure.chain import Connection

# Heuristic: the checks compare derivatives, which a backward through a block rounds more often than a forward.
ROUNDINGS = 3.0


def require_frozen(routing: FrozenRouting, states: Mapping[int, torch.Tensor]) -> None:
    """Refuse where the derivative of a connection is not that of its formula with constant coefficients.

    A model may use other tensors than those that its connection returned: an attribute, the fused tensor of which they are
    slices, or the same weights computed again. Their values agree, so nothing but the derivative shows it. With the branch
    input b = H_pre · X as a tensor of the graph, and a random cotangent u at X', the total derivatives must satisfy

        ∂X'/∂X · u = H_resᵀ u + H_preᵀ (∂X'/∂b · u)        (coefficients do not depend on X)
        ∂X'/∂b · u = 0   for u ⟂ H_post                    (b acts through H_post ⊗ F(b) alone)

    and, for u ⟂ H_post, the derivative by the first state must be that through X alone (no weights of an earlier depth).
    A gate on all of H_post at once that is computed from b outside of the connection is the one case that passes.

    ``states``: the states of the forward by depth, with the graph between them.
    Raises StreamConnectionError: With the first connection that was not frozen, and by how much its derivative differs.
    """
    generator = torch.Generator().manual_seed(0)
    later: list[torch.Tensor] = []
    earlier: list[torch.Tensor] = []
    cotangents: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, link in routing.links.items():
        call, x, x_next = routing.call_of(number, link), states[link.depth_in], states[link.depth_out]
        check = _DerivativeCheck(call, x, x_next, generator)
        limit = ROUNDINGS * tolerance(routing.precision)
        if not check.error <= limit:  # NaN, where nothing is finite, is refused too
            raise StreamConnectionError(_not_frozen(number, link, check.error, limit))
        later.append(x_next)
        earlier.append(x)
        cotangents.append((check.cotangent, check.carried))
    if not later:
        return
    # All connections at once, with independent cotangents: two backwards in place of two for each pair of depths.
    first = states[min(states)]
    total = _gradient(later, [first], [u for u, _ in cotangents])[0]
    through = _gradient(earlier, [first], [v for _, v in cotangents])[0]
    limit = ROUNDINGS * tolerance(routing.precision)
    error = _finite_error(total, through)
    if not error <= limit:
        number, link = next(iter(routing.links.items()))
        raise StreamConnectionError(_not_frozen(number, link, error, limit, "it or a later one"))


def _not_frozen(number: int, link: Connection, error: float, limit: float, which: str = "it") -> str:
    return (
        f"routing='frozen': connection {number} ({link.path!r}) returned H_pre, H_post and H_res and they were replaced by "
        f"constants, but the derivative of the next state differs from that of H_res X + H_post ⊗ F(H_pre X) by {error:.1e} "
        f"(limit {limit:.0e}): {which} is applied with other tensors than those returned, such as an attribute, slices of one "
        f"fused tensor, or weights that are computed again; {INSTEAD}"
    )


class _DerivativeCheck:
    """The first two equations of `require_frozen` for one connection.

    Attributes
    ----------
    error : float
        The larger of both relative errors.
    cotangent, carried : Tensor
        u ⟂ H_post at X' and H_resᵀ u at X, in the layouts of the states.
    """

    def __init__(
        self, call: FrozenCall, x: torch.Tensor, x_next: torch.Tensor, generator: torch.Generator
    ) -> None:
        self._call, self._x, self._x_next = call, x, x_next
        assert call.parts is not None
        # In float64, so that the check adds no rounding of its own to the model's.
        write, streams = call.parts.write.double(), self._canonical(x)
        batch_size, tokens, _, width = streams.shape
        self._views = (batch_size, tokens, call.read.shape[-2], width)
        any_u = torch.randn(streams.shape, generator=generator, dtype=torch.float64).to(x.device)
        # u ⟂ H_post for every token and feature: the part of u in the span of H_post is taken away.
        orthogonal_u = any_u - write @ (torch.linalg.pinv(write) @ any_u)
        by_x, by_branch = self._derivatives(any_u)
        _, by_branch_orthogonal = self._derivatives(orthogonal_u)
        read = torch.einsum("btvn,btvd->btnd", call.read.double(), by_branch)
        errors = {}
        # Which axis of H_res is the destination is not known here: the orientation that fits better counts.
        for matrix in orientations(call.parts.mix, streams):
            errors[_finite_error(by_x, matrix.double().mT @ any_u + read)] = matrix.double()
        best = min(errors)
        # Relative to the derivative by any u; tiny, since a branch without a derivative leaks nothing.
        leak = _finite_norm(by_branch_orthogonal) / max(
            _finite_norm(by_branch), torch.finfo(torch.float64).tiny
        )
        self.error = max(best, leak)
        self.cotangent = self._as_state(orthogonal_u, x_next)
        self.carried = self._as_state(errors[best].mT @ orthogonal_u, x)

    def _canonical(self, state: torch.Tensor) -> torch.Tensor:
        assert self._call.parts is not None
        return canonical_streams(self._call.site, state.detach(), self._call.parts.branch_in.shape[0])

    def _as_state(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return rearranged(values, self._canonical, like).to(like.dtype)

    def _derivatives(self, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By X, (B, T, N, D), and by the branch input, (B, T, V, D)."""
        at = self._as_state(cotangent, self._x_next)
        by_x, by_branch = _gradient([self._x_next], [self._x, self._call.branch_in], [at])
        views = as_views(by_branch, *self._views)
        assert views is not None
        return self._canonical(by_x).double(), views.double()


def _gradient(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], cotangents: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Total derivatives; zero where nothing links."""
    found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def _finite_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error over finite entries: padding may have no finite gradient. NaN where nothing is finite."""
    finite = value.isfinite() & expected.isfinite()
    if not finite.any():
        return float("nan")
    return relative_error(value[finite] - expected[finite], expected[finite])


def _finite_norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value[value.isfinite()].double()))
