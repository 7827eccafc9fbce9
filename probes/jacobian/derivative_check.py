"""Were all coefficients of the connections constant? The derivative of each next state is compared with that of the formula.

    X' = H_res X + H_post ⊗ F(H_pre · X),    Jᵀu = H_resᵀ u + H_preᵀ F'ᵀ (H_post · u)

Shapes: t token, n stream, v stream of a branch, f feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from depthscope.probes.connections.coefficients import StreamConnectionError, relative_error, tolerance
from depthscope.probes.jacobian.differentiable_forward import State, gradients
from depthscope.probes.jacobian.frozen_routing import INSTEAD, FrozenConnection, FrozenRouting

# Heuristic: the checks compare derivatives, which a backward through a block rounds more often than a forward.
ROUNDINGS = 3.0


def require_frozen(routing: FrozenRouting, states: Mapping[int, State]) -> None:
    """Refuse where the derivative of a connection is not that of its formula with constant coefficients.

    A model may compute its weights where no operation shows it, as in a kernel of its own. With the branch input
    b = H_pre · X as a tensor of the graph, and a random cotangent u at X', the total derivatives must satisfy

        ∂X'/∂X · u = H_resᵀ u + H_preᵀ (∂X'/∂b · u)        (coefficients do not depend on X)
        ∂X'/∂b · u = 0   for u ⟂ H_post                    (b acts through H_post ⊗ F(b) alone)

    and, for u ⟂ H_post, the derivative by the first state must be that through X alone (no weights of an earlier depth).

    ``states``: the states of the forward by depth, with the graph between them.
    Raises StreamConnectionError: With the first connection that was not frozen, and by how much its derivative differs.
    """
    generator = torch.Generator().manual_seed(0)
    limit = ROUNDINGS * tolerance(routing.precision)
    later: list[State] = []
    earlier: list[State] = []
    cotangents: list[tuple[torch.Tensor, torch.Tensor]] = []
    for connection in routing.connections:
        check = _DerivativeCheck(routing, connection, states, generator)
        if not check.error <= limit:  # NaN, where nothing is finite, is refused too
            raise StreamConnectionError(_not_frozen(routing, connection, check.error, limit))
        later.append(states[connection.depth_out])
        earlier.append(states[connection.depth_in])
        cotangents.append((check.cotangent, check.carried))
    if not later:
        return
    # All connections at once, with independent cotangents: two backwards in place of two for each pair of depths.
    first = states[min(states)]
    total = _gradient(later, [first], [u for u, _ in cotangents])[0]
    through = _gradient(earlier, [first], [v for _, v in cotangents])[0]
    error = _finite_error(total, through)
    if not error <= limit:
        raise StreamConnectionError(
            _not_frozen(routing, routing.connections[0], error, limit, "it or a later one")
        )


def _not_frozen(
    routing: FrozenRouting, connection: FrozenConnection, error: float, limit: float, which: str = "it"
) -> str:
    return (
        f"routing='frozen': H_pre, H_post and H_res of {routing.name(connection.depth_in)} were held constant, but the "
        f"derivative of the next state differs from that of H_res X + H_post ⊗ F(H_pre X) by {error:.1e} (limit {limit:.0e}): "
        f"{which} computes weights where no operation of torch shows it, such as in a kernel of its own; {INSTEAD}"
    )


class _DerivativeCheck:
    """The first two equations of `require_frozen` for one connection.

    ``error``: the larger of both relative errors.
    ``cotangent, carried``: u ⟂ H_post at X' and H_resᵀ u at X, in the layouts of the states.
    """

    def __init__(
        self,
        routing: FrozenRouting,
        connection: FrozenConnection,
        states: Mapping[int, State],
        generator: torch.Generator,
    ) -> None:
        self._routing, self._connection = routing, connection
        self._x, self._x_next = states[connection.depth_in], states[connection.depth_out]
        # In float64, so that the check adds no rounding of its own to the model's.
        shape = routing.array(connection.depth_out, self._x_next.value.detach()).shape
        any_u = torch.randn(shape, generator=generator, dtype=torch.float64).to(self._x.value.device)
        mix = connection.parts.h_res.to(any_u)
        orthogonal_u = _orthogonal(any_u, [branch.write.to(any_u) for branch in connection.parts.branches])
        by_x, by_branch = self._derivatives(any_u)
        leaks, by_branch_orthogonal = self._derivatives(orthogonal_u)
        errors = [_finite_error(leaks, self._through_streams(mix, orthogonal_u, by_branch_orthogonal))]
        if connection.reads:
            errors.append(_finite_error(by_x, self._through_streams(mix, any_u, by_branch)))
            # Relative to the derivative by any u; tiny, since a branch without a derivative leaks nothing.
            leak, size = (
                sum(float(torch.linalg.vector_norm(value[value.isfinite()].double())) for value in by)
                for by in (by_branch_orthogonal, by_branch)
            )
            errors.append(leak / max(size, torch.finfo(torch.float64).tiny))
        self.error = max(errors) if all(error == error for error in errors) else float("nan")
        self.cotangent = routing.like_state(connection.depth_out, orthogonal_u, self._x_next.value)
        self.carried = routing.like_state(connection.depth_in, _transposed(mix, orthogonal_u), self._x.value)

    def _through_streams(
        self, mix: torch.Tensor, cotangent: torch.Tensor, by_branch: list[torch.Tensor]
    ) -> torch.Tensor:
        """H_resᵀ u + H_preᵀ (∂X'/∂b · u)."""
        found = _transposed(mix, cotangent)
        for (_, _, weights), gradient in zip(self._connection.reads, by_branch, strict=True):
            found = found + _transposed(weights.to(gradient), gradient)
        return found

    def _derivatives(self, cotangent: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """By X, and by what each branch takes."""
        routing, connection = self._routing, self._connection
        at = routing.like_state(connection.depth_out, cotangent, self._x_next.value)
        taken = [State.of(tensor) for tensor, _, _ in connection.reads]
        by_x, *by_branch = _gradient([self._x_next], [self._x, *taken], [at])
        reads = zip(connection.reads, by_branch, strict=True)
        arrays = [routing.as_read(value, gradient).double() for (_, value, _), gradient in reads]
        return routing.array(connection.depth_in, by_x).double(), arrays


def _transposed(weights: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Weights (t, n', n, f or 1), transposed, times a cotangent (t, n', f)."""
    return (weights * cotangent.unsqueeze(2)).sum(1)


def _orthogonal(cotangent: torch.Tensor, writes: list[torch.Tensor]) -> torch.Tensor:
    """The part of a cotangent (t, n, f) that no write (t, n, v, f or 1) has, for every token and feature."""
    if not writes:
        return cotangent
    features = max(write.shape[-1] for write in writes)
    # (t, f or 1, n, v).
    write = torch.cat([w.expand(*w.shape[:-1], features) for w in writes], 2).movedim(-1, 1)
    u = cotangent.mT.unsqueeze(-1)
    return (u - write @ (torch.linalg.pinv(write) @ u)).squeeze(-1).mT


def _gradient(
    outputs: list[State], inputs: list[State], cotangents: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Total derivatives; zero where nothing links."""
    found = gradients(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(of.value) if g is None else g for of, g in zip(inputs, found, strict=True)]


def _finite_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error over finite entries: padding may have no finite gradient. NaN where nothing is finite."""
    finite = value.isfinite() & expected.isfinite()
    if not finite.any():
        return float("nan")
    return relative_error(value[finite] - expected[finite], expected[finite])
