"""The largest singular values of the Jacobian of every block, and of all blocks together, by products with J and Jᵀ alone.

The model runs once with its weights held constant. From then on Jᵀu is one backward through the stored graph, and Jv one
backward through the graph of that backward, since u ↦ Jᵀu is linear (the double-backward trick): no forward mode is needed,
and attention runs on its plain kernel, which alone has second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.jacobian.differentiable_forward import (
    JacobianError,
    StartError,
    State,
    constant_weights,
    differentiable_states,
    explained,
    gradients,
    viewed,
)
from depthscope.probes.model.preserved_state import eager, preserved_state
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.session.forward import Forward
from depthscope.probes.session.model_call import call_observed
from depthscope.probes.session.options import ModelOptions, Options, Scope, takes_options
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Chain

OVERSAMPLING, POWER = 8, 3
# Largest relative difference of ⟨u, J v⟩ and ⟨Jᵀu, v⟩ that is rounding; a heuristic. A backward without a graph of its own,
# which the check looks for, leaves out a term and differs by order one.
ADJOINT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}


@takes_options(ModelOptions)
def jacobian(
    model: nn.Module,
    batch: Any,
    *,
    values: int = 8,
    chain: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    r"""The largest singular values of every block's Jacobian, and of all blocks together.

    .. math:: J_l = \partial x_l / \partial x_{l-1}, \quad J = \partial x_L / \partial x_0

    over the states of all real tokens. Dynamical isometry is σ = 1 everywhere: every small change keeps its size.

    Parameters
    ----------
    model : Module
        Run as it is. Weights, gradients, buffers, random state and hooks are the same afterwards.
    batch : mapping, tensor or tuple
        One small batch, as in `capture`: a product costs one backward, and each block takes about 8 (values + 8) of them.
    values : int
        How many singular values.
    chain : str, optional
        Name of the chain where a model has several; the first one when not given.
    seed : int
        Of the random start.
    progress : callable, optional
        Called with (what, number done, number in all).
    **options
        How the model is read: ``layers``, ``layout``, ``streams``, ``mask``.

    Returns
    -------
    Dataset
        ``singular_value`` (depth, order), falling, with ``singular_value_error``: some σ lies within it. Depth l is the
        Jacobian from the state at l − 1. The same of all blocks as ``whole_singular_value`` (order). NaN where there are
        fewer.

    Raises
    ------
    JacobianError
        Where nothing links the states, or an operation has no second derivative.

    Notes
    -----
    Randomised range finding with power iterations (Halko, Martinsson and Tropp 2011, arXiv 0909.4061): values are lower
    bounds of the largest ones. The derivative is total: long skips count. Products are rounded as the model rounds.

    Examples
    --------
    >>> model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
    >>> with torch.no_grad():
    ...     for layer in model:
    ...         _ = layer.weight.copy_(torch.diag(torch.tensor([2.0, 0.5])))
    >>> found = jacobian(model, torch.ones(1, 2), values=2)
    >>> found.singular_value.values.round(6).tolist(), found.whole_singular_value.values.round(6).tolist()
    ([[2.0, 0.5], [2.0, 0.5]], [4.0, 0.25])
    """
    if values < 1:
        raise InputError(f"got values={values}; expected how many singular values are wanted, 1 or more")
    # A list or a loader means several batches elsewhere; a Jacobian is that of one forward.
    if not isinstance(batch, (Mapping, torch.Tensor, tuple)):
        raise JacobianError(
            f"got a batch of type {type(batch).__name__}; expected one mapping, tensor or tuple"
        )
    session, forward = _first_forward(model, batch, Options(**options, max_sequences=1))
    number, found_chain = _named(session.structure.chains, chain)
    states, views = _states(model, batch, found_chain)
    depths = sorted(states)

    def entries(depth: int) -> torch.Tensor:
        """1 at every entry of a real token, 0 at padding; in the model's layout."""
        state = states[depth].value
        if (mask := forward.masks.get(number)) is None:
            return torch.ones_like(state)
        # Numbered entries are rearranged as the state would be: its layout is known in one place only.
        numbers = torch.arange(state.numel(), device=state.device).reshape(state.shape)
        numbers = viewed(numbers, views if depth == depths[0] else ())
        rows = session.structure.canonical(number, numbers, forward.batch_size, depth)
        kept = torch.zeros_like(state).flatten()
        kept[rows[mask.to(rows.device)].flatten()] = 1
        return kept.view(state.shape)

    spans = [*pairwise(depths), (depths[0], depths[-1])]
    found = []
    for done, (start, stop) in enumerate(spans):
        if progress is not None:
            progress(f"the Jacobian from depth {start} to {stop}", done, len(spans))
        # One at a time: each keeps a graph of its own for the products with J.
        operator = _Jacobian(states[start], states[stop], entries(start), entries(stop))
        found.append([np.pad(each, (0, max(0, values - len(each))), constant_values=np.nan)
                      for each in operator.largest(values, seed)])  # fmt: skip
    *blocks, whole = found
    return xr.Dataset(
        {
            "singular_value": (("depth", "order"), np.array([block[0] for block in blocks])),
            "singular_value_error": (("depth", "order"), np.array([block[1] for block in blocks])),
            "whole_singular_value": ("order", whole[0]),
            "whole_singular_value_error": ("order", whole[1]),
        },
        {"depth": depths[1:], "order": np.arange(1, values + 1)},
        {
            "start": depths[0],
            "chain": found_chain.name or "",
            "dtype": str(states[depths[0]].value.dtype),
            "seed": seed,
        },
    )


def _first_forward(model: nn.Module, batch: Any, options: Options) -> tuple[Session, Forward]:
    """Find the chains in a forward of its own, without gradients."""
    session = Session(model, options, scope=Scope(only_own=True))
    # Weights that are constants here too: torch runs other operations where they are none.
    with preserved_state(model), constant_weights(model), eager(), torch.no_grad():
        session.attach()
        try:
            call_observed(session, batch)
            session.raise_first_error()
            assert session.step.last is not None
            return session, session.step.last
        finally:
            session.detach()


def _named(chains: Sequence[Chain], name: str | None) -> tuple[int, Chain]:
    names = [chain.name for chain in chains]
    if name is not None and name not in names:
        raise JacobianError(f"no chain {name!r}; the model has {', '.join(map(repr, names))}")
    number = 0 if name is None else names.index(name)
    if len(chains[number].points) < 2:
        raise JacobianError("the chain has one state; a Jacobian needs two")
    return number, chains[number]


def _states(model: nn.Module, batch: Any, chain: Chain) -> tuple[dict[int, State], Sequence[TracedValue]]:
    """The states of one forward with the graph between them, from the first depth at which a graph can begin."""
    last = len(chain.points) - 1
    for first in range(last):
        try:
            return differentiable_states(model, batch, chain, first, last)
        except StartError:
            if first + 1 == last:
                raise
    raise AssertionError("a chain of two states has a first one")


class _Jacobian:
    """Products with J = ∂ state(stop) / ∂ state(start) and with Jᵀ, over the entries of real tokens."""

    def __init__(self, source: State, target: State, moved: torch.Tensor, seen: torch.Tensor):
        self._source, self._target, self._moved, self._seen = source, target, moved, seen
        self._pulled: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rank = int(min(moved.sum(), seen.sum()))

    def largest(self, values: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest singular values, falling, and ‖J v_i − σ_i u_i‖ of each, within which some σ lies."""
        count = min(values, self.rank)
        width = min(count + OVERSAMPLING, self.rank)  # more columns than the rank would be linearly dependent
        generator = torch.Generator().manual_seed(
            seed
        )  # on the CPU, so that a seed means the same everywhere
        start = torch.randn((width, *self._moved.shape), generator=generator, dtype=torch.float64)
        basis = _orthonormal(self._products(self.push, start.to(self._moved.device) * self._moved))
        # Orthonormal after every product: powers of J alone would lose the smaller σ to rounding.
        for _ in range(POWER):
            basis = _orthonormal(self._products(self.push, _orthonormal(self._products(self.pull, basis))))
        # Rows of QᵀJ: its singular values are those of J within the residual.
        right = self._products(self.pull, basis)
        left, found, rows = torch.linalg.svd(right.flatten(1), full_matrices=False)
        top = torch.einsum("wk,w...->k...", left[:, :count], basis)
        again = self._products(self.push, rows[:count].view(count, *self._moved.shape))
        residual = (again - top * found[:count].view(-1, *[1] * self._seen.ndim)).flatten(1)
        return found[:count].cpu().numpy(), torch.linalg.vector_norm(residual, dim=1).cpu().numpy()

    @staticmethod
    def _products(product: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        return torch.stack([product(vector) for vector in vectors])

    def pull(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Jᵀ u: how a gradient at the later state arrives at the earlier one."""
        with explained():
            # Retained: every product is one more backward through the same graph.
            given = (cotangent * self._seen).to(self._target.value.dtype)
            return self._gradient(given, retain_graph=True).double() * self._moved

    def push(self, tangent: torch.Tensor) -> torch.Tensor:
        """J v: how a small change of the earlier state moves the later one."""
        with explained():
            # Built at the first product with J: those with Jᵀ alone need no second graph.
            if self._pulled is None:
                with torch.inference_mode(False), torch.enable_grad():
                    # u ↦ Jᵀu is linear, so its derivative does not depend on u, and zeros will do.
                    zeros = torch.zeros_like(self._target.value).requires_grad_()
                    self._pulled = zeros, self._gradient(zeros, create_graph=True)
                self._require_adjoint()
            zeros, pulled = self._pulled
            given = (tangent * self._moved).to(self._source.value.dtype)
            (found,) = torch.autograd.grad(pulled, zeros, given, retain_graph=True)
            return found.double() * self._seen

    def _gradient(self, cotangent: torch.Tensor, **options: bool) -> torch.Tensor:
        (found,) = gradients([self._target], [self._source], [cotangent], **options)
        assert found is not None
        return found

    def _require_adjoint(self) -> None:
        """⟨u, J v⟩ = ⟨Jᵀu, v⟩ for one random pair: a kernel whose backward has no graph would silently be left out."""
        generator = torch.Generator().manual_seed(0)
        v, u = (
            torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.device) * each
            for each in (self._moved, self._seen)
        )
        pushed = self.push(v)
        gap = (pushed * u).sum() - (self.pull(u) * v).sum()
        error = float(gap.abs() / torch.linalg.vector_norm(pushed))
        limit = ADJOINT[self._target.value.dtype]
        if error > limit:
            self._pulled = None
            raise JacobianError(
                f"products with J and with Jᵀ disagree by {error:.1e} (limit {limit:.0e}): some operation's backward has no "
                "derivative of its own; load the model with attn_implementation='eager' or without custom kernels"
            )


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of some arrays of one shape, by QR."""
    return torch.linalg.qr(vectors.flatten(1).mT).Q.mT.view(-1, *vectors.shape[1:])
