"""Jacobians between the states of a residual chain: products with J and Jᵀ, never J itself.

The model runs once with its weights held constant. From then on Jᵀu is one backward through the stored graph, and Jv one
backward through the graph of that backward, since u ↦ Jᵀu is linear (the double-backward trick): no forward mode is needed,
and attention runs on its plain kernel, which alone has second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import nn

from depthscope.probes.jacobian.differentiable_forward import JacobianError, State, explained, gradients
from depthscope.probes.jacobian.state_graph import (
    Entries,
    Routing,
    Selection,
    StateGraph,
    Tokens,
    state_graph,
)
from depthscope.probes.session.options import ModelOptions, Options, takes_options


@takes_options(ModelOptions)
def jacobian(
    model: nn.Module,
    batch: Any,
    *,
    start: int | None = None,
    stop: int | None = None,
    chain: str | None = None,
    tokens: Tokens = "own",
    positions: Sequence[int] | None = None,
    routing: Routing = "full",
    **options: Unpack[ModelOptions],
) -> JacobianOperator:
    """J = ∂ state(stop) / ∂ state(start) of a model's residual chain, as a linear operator.

    Parameters
    ----------
    model : Module
        Run as it is: its mode, its precision. Weights, gradients, buffers, random state and hooks are the same afterwards.
    batch : mapping, tensor or tuple
        One batch, as in `probes.capture`.
    start, stop : int
        Depths as in ``/trace``: 0 is the embedding. When not given, ``start`` is the first depth at which a graph can begin,
        mostly 0 (not where one tensor is several streams of it), and ``stop`` is the last one.
    chain : str, optional
        Name of the chain where a model has several, such as ``"decoder"``; the first one when not given.
    tokens : {"own", "all"}
        ``"own"``: block diagonal, ∂h_t(stop)/∂h_t(start) for every token t; a product costs one backward for every token of
        the longest sequence (see ``positions``). ``"all"``: every token moves every token; one backward.
    positions : sequence of int, optional
        Token positions to keep, rows and columns.
    routing : {"full", "frozen"}
        With stream connections: differentiate through the coefficients H_pre, H_post and H_res, or hold them constant at their
        values. A plain residual chain has none, and both give the same.
    **options
        Some options of `Options`. Only real tokens are moved and seen.

    Returns
    -------
    JacobianOperator
        Shape (out, in), entries ordered (sample, token, stream, feature) over the real tokens. It keeps the graph of the
        chain from start to stop: use it before the weights change, then let go of it.

    Raises
    ------
    JacobianError
        For an unknown depth, a start that is not before stop, or a chain without a gradient path.
    ChainError, LayoutError, StreamConnectionError
        Where the model cannot be read, as in `probes.capture`.

    Notes
    -----
    The derivative is total: whatever the model computes later from the state at ``start``, long skips included, counts.
    Experts chosen by a top-k are a constant choice in both routings, their gates are differentiated.
    Products are rounded as the model rounds: in bfloat16 to about three digits, which no estimator's error counts; convert the
    model to float32 for more.

    Examples
    --------
    >>> model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    >>> with torch.no_grad():
    ...     for layer in model:
    ...         _ = layer.weight.copy_(torch.tensor([[2.0, 1.0], [0.0, 2.0]]))
    >>> op = jacobian(model, torch.ones(1, 2))
    >>> op.shape, op.matvec(torch.tensor([0.0, 1.0])).tolist(), op.rmatvec(torch.tensor([1.0, 0.0])).tolist()
    ((2, 2), [12.0, 8.0], [8.0, 12.0])
    """
    # One stored sequence is enough: the chains and masks are taken from the first forward, and its sample is not used.
    selection = Selection(Options(**options, max_sequences=1), chain, tokens, positions, routing)
    graph = state_graph(model, batch, start, stop, selection)
    return operator_between(graph, graph.start, graph.stop)


@takes_options(ModelOptions)
def block_jacobians(
    model: nn.Module,
    batch: Any,
    *,
    start: int | None = None,
    stop: int | None = None,
    chain: str | None = None,
    tokens: Tokens = "own",
    positions: Sequence[int] | None = None,
    routing: Routing = "full",
    **options: Unpack[ModelOptions],
) -> list[JacobianOperator]:
    """∂ state(l+1) / ∂ state(l) for every depth from start to stop, from one forward.

    Parameters
    ----------
    model, batch, start, stop, chain, tokens, positions, routing
        As in `jacobian`.
    **options
        Some options of `Options`.

    Returns
    -------
    list of JacobianOperator
        The earliest first. With ``tokens="all"`` their product, later ones on the left, is the end-to-end Jacobian of a chain
        whose blocks read no state but the one before them.

    Raises
    ------
    JacobianError
        As in `jacobian`.

    Examples
    --------
    >>> model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    >>> [(op.start, op.stop) for op in block_jacobians(model, torch.ones(1, 2))]
    [(0, 1), (1, 2), (2, 3)]
    """
    selection = Selection(Options(**options, max_sequences=1), chain, tokens, positions, routing)
    graph = state_graph(model, batch, start, stop, selection)
    return [operator_between(graph, a, b) for a, b in pairwise(range(graph.start, graph.stop + 1))]


def operator_between(graph: StateGraph, start: int, stop: int) -> JacobianOperator:
    """The Jacobian of two states of one graph.

    ``graph``: of a forward.
    ``start, stop``: depths that it has.
    """
    source, target = graph.entries(start, stop)
    return JacobianOperator(graph.states[start], graph.states[stop], source, target, start=start, stop=stop)


# Largest relative difference of ⟨u, J v⟩ and ⟨Jᵀu, v⟩ that is rounding; a heuristic. A backward without a graph of its own,
# which the check looks for, leaves out a term and differs by order one.
ADJOINT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# For each group of tokens, at the source and at the target: positions in the packed vector, and in the flat state.
Moves: TypeAlias = list[tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]


class JacobianOperator:
    """Products with J = ∂ state(stop) / ∂ state(start) and with Jᵀ, on the packed entries of the selected tokens.

    Parameters
    ----------
    source, target : State
        The two states, in the model's layout, with the graph between them.
    source_entries, target_entries : Entries
        Where the selected tokens' entries are in the two states.
    start, stop : int
        Their depths.

    Attributes
    ----------
    shape : (int, int)
        (out, in); entries ordered (token, stream, feature), the tokens of all sequences in a row.
    """

    def __init__(
        self,
        source: State,
        target: State,
        source_entries: Entries,
        target_entries: Entries,
        *,
        start: int,
        stop: int,
    ):
        self.start = start
        self.stop = stop
        self.num_tokens, self.num_streams, self.num_features = source_entries.slots.shape
        self.shape = (target_entries.slots.numel(), source_entries.slots.numel())
        self._source = source
        self._target = target
        self._moves = list(zip(source_entries.groups(), target_entries.groups(), strict=True))
        self._pulled: tuple[torch.Tensor, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return f"JacobianOperator({self.start} → {self.stop}, shape={self.shape}, {self.num_tokens} tokens)"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the states, in which products are computed."""
        return self._target.value.dtype

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self._target.value.device

    def matvec(self, vector: torch.Tensor, /) -> torch.Tensor:
        """How a perturbation of state(start) moves state(stop): J v.

        ``vector``: v, (in,).
        Returns: (out,), in the dtype of v.
        """
        return self._product(vector, self._source.value, self._moves, self.shape, self._push)

    def rmatvec(self, vector: torch.Tensor, /) -> torch.Tensor:
        """How a gradient at state(stop) arrives at state(start): Jᵀ u.

        ``vector``: u, (out,).
        Returns: (in,), in the dtype of u.
        """
        back = [(target, source) for source, target in self._moves]
        return self._product(vector, self._target.value, back, self.shape[::-1], self._pull)

    def as_linear_operator(self) -> LinearOperator:
        """The same map for scipy, float64 numpy vectors in and out.

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
        """

        def through(product: Any) -> Any:
            return lambda v: product(torch.from_numpy(np.array(v, np.float64).ravel())).cpu().numpy()

        return LinearOperator(
            self.shape, matvec=through(self.matvec), rmatvec=through(self.rmatvec), dtype=np.dtype(np.float64)
        )

    def _product(
        self,
        vector: torch.Tensor,
        state: torch.Tensor,
        moves: Moves,
        shape: tuple[int, ...],
        apply: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Spread the vector over a state, group by group of tokens, apply, and gather what arrives at the same group."""
        size, wanted = shape
        if vector.shape != (wanted,):
            raise JacobianError(
                f"got a vector of shape {tuple(vector.shape)}; expected ({wanted},): one entry for every stream and feature "
                f"of the {self.num_tokens} selected tokens"
            )
        # scipy hands over float64 and gets it back; the products are in the model's precision.
        given = vector.detach().to(state.device, state.dtype)
        moved = torch.zeros(size, dtype=vector.dtype, device=state.device)
        for (at, slots_at), (to, slots_to) in moves:
            # Contiguous, whatever the strides of the state: the slots count its entries in the order of its axes.
            spread = torch.zeros_like(state, memory_format=torch.contiguous_format).flatten()
            spread[slots_at] = given[at]
            moved[to] = apply(spread.view(state.shape)).flatten()[slots_to].to(vector.dtype)
        return moved

    def _pull(self, cotangent: torch.Tensor) -> torch.Tensor:
        with explained():
            # Retained: every product is one more backward through the same graph.
            return self._gradient(cotangent, retain_graph=True)

    def _gradient(self, cotangent: torch.Tensor, **options: bool) -> torch.Tensor:
        (found,) = gradients([self._target], [self._source], [cotangent], **options)
        assert found is not None
        return found

    def _push(self, tangent: torch.Tensor) -> torch.Tensor:
        with explained():
            # Built at the first product with J: those with Jᵀ alone need no second graph.
            if self._pulled is None:
                self._pulled = self._linear_graph()
                self._require_adjoint()
            cotangent, pulled = self._pulled
            return torch.autograd.grad(pulled, cotangent, tangent, retain_graph=True)[0]

    def _linear_graph(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A placeholder u and the graph of Jᵀu, whose own backward is the product with J."""
        with torch.inference_mode(False), torch.enable_grad():
            # u ↦ Jᵀu is linear, so its derivative does not depend on u, and zeros will do
            cotangent = torch.zeros_like(self._target.value).requires_grad_()
            pulled = self._gradient(cotangent, create_graph=True)
        return cotangent, pulled

    def _require_adjoint(self) -> None:
        """⟨u, J v⟩ = ⟨Jᵀu, v⟩ for one random pair: a kernel whose backward has no graph would silently be left out."""
        (_, source), (_, target) = self._moves[0]
        generator = torch.Generator().manual_seed(0)
        source_state, target_state = self._source.value, self._target.value
        v, u = (torch.zeros(state.numel(), dtype=state.dtype) for state in (source_state, target_state))
        for vector, slots in ((v, source), (u, target)):
            vector[slots.cpu()] = torch.randn(len(slots), generator=generator, dtype=vector.dtype)
        pushed = self._push(v.to(self.device).view(source_state.shape)).flatten()[target].double()
        pulled = self._pull(u.to(self.device).view(target_state.shape)).flatten()[source].double()
        gap = pushed @ u.to(self.device)[target].double() - pulled @ v.to(self.device)[source].double()
        error = float(gap.abs() / torch.linalg.vector_norm(pushed))
        if error > ADJOINT[self.dtype]:
            self._pulled = None  # the next product with J must be refused again
            raise JacobianError(
                f"products with J and with Jᵀ disagree by {error:.1e} (limit {ADJOINT[self.dtype]:.0e} for {self.dtype}): "
                "some operation's backward has no derivative of its own. Products with Jᵀ are right; for those with J load "
                "the model with attn_implementation='eager' or without custom kernels"
            )
