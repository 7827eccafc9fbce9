"""The largest singular values of the Jacobian of every block, and of all blocks together, by products with J and Jᵀ alone.

The model runs once, as in a capture with gradients, which notes where the graph of each state begins. From then on Jᵀu is one
backward through the stored graph, and Jv one backward through the graph of that backward, since u ↦ Jᵀu is linear (the
double-backward trick): no forward mode is needed, and attention runs on its plain kernel, which alone has second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.session.forward import Forward, leads_to
from depthscope.probes.session.model_call import graph_of_frozen, with_gradients
from depthscope.probes.session.options import ModelOptions, Options, Scope, takes_options
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Chain

SECOND = (
    "an operation of this model has no second derivative, which products with J need (those with Jᵀ do not); load the model "
    "with attn_implementation='eager' or without custom kernels"
)
UNLINKED = "the later state does not depend on the earlier one: some block between them is skipped or runs without gradients"
# By words of torch's own messages, which have no classes of their own.
EXPLANATIONS = {
    "modified by an inplace operation": "a weight or a state was rewritten since the Jacobian's forward; take the Jacobian "
    "again after every change of the weights",
    "is not implemented": SECOND,
    "does not require grad": SECOND,
    "checkpoint": "activation checkpointing recomputes blocks in a way that has no second derivative; turn it off, for "
    "example with model.gradient_checkpointing_disable() or model.eval()",
}


class JacobianError(InputError):
    """A Jacobian that cannot be had."""


@dataclass(frozen=True, eq=False)
class State:
    """Where the graph of a state begins: one edge, or one for each stream, which then are the first axis of its ``like``.

    ``like``: a tensor of its shape, type and device.
    """

    edges: tuple[Any, ...]
    like: torch.Tensor

    def parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Values of the state as they belong to its edges."""
        return list(values) if len(self.edges) > 1 else [values]


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors into advice."""
    try:
        yield
    except RuntimeError as error:
        for sign, advice in EXPLANATIONS.items():
            if sign in str(error):
                raise JacobianError(f"{advice} (torch: {str(error).splitlines()[0][:200]})") from error
        raise


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
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    r"""The largest singular values of every block's Jacobian, and of all blocks together.

    .. math:: J_l = \partial x_l / \partial x_{l-1}, \quad J = \partial x_L / \partial x_0

    over the states of all real tokens. Dynamical isometry is σ = 1 everywhere: every small change keeps its size.

    Parameters
    ----------
    model : Module
        Run as it is, once. Weights, gradients, buffers, random state and hooks are the same afterwards.
    batch : mapping, tensor or tuple
        One small batch, as in `capture`: a product costs one backward, and each block takes about 8 (values + 8) of them.
    values : int
        How many singular values.
    chain : str, optional
        Name of the chain where a model has several; the first one when not given.
    seed : int
        Of the random start.
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
    with preserved_state(model), graph_of_frozen(model, wanted=True), sdpa_kernel(SDPBackend.MATH):
        session, forward = _first_forward(model, batch, Options(**options, gradients=True, max_sequences=1))
        try:
            return _measured(session, forward, values, chain, seed)
        finally:
            session.drop()


def _measured(
    session: Session,
    forward: Forward,
    values: int,
    chain: str | None,
    seed: int,
) -> xr.Dataset:
    number, found_chain = _named(session.structure.chains, chain)
    states = _states(forward, number, len(found_chain.points))
    depths = sorted(states)

    def entries(depth: int) -> torch.Tensor:
        """1 at every entry of a real token, 0 at padding; in the model's layout."""
        like = states[depth].like
        if (mask := forward.masks.get(number)) is None:
            return torch.ones_like(like)
        # Numbered entries are rearranged as the state would be: its layout is known in one place only.
        numbers = torch.arange(like.numel(), device=like.device).reshape(like.shape)
        rows = session.structure.canonical(number, numbers, forward.batch_size, depth)
        kept = torch.zeros_like(like).flatten()
        kept[rows[mask.to(rows.device)].flatten()] = 1
        return kept.view(like.shape)

    spans = [*pairwise(depths), (depths[0], depths[-1])]
    found = []
    for start, stop in spans:
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
            "dtype": str(states[depths[0]].like.dtype),
            "seed": seed,
        },
    )


def _first_forward(model: nn.Module, batch: Any, options: Options) -> tuple[Session, Forward]:
    """One forward with a graph, which notes where that of each state begins."""
    session = Session(model, options, scope=Scope(only_own=True, sums=False))
    session.attach()
    try:
        # Inference tensors record no graph even where gradients are on.
        with torch.inference_mode(False), torch.enable_grad():
            session.call(with_gradients(batch))
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


def _states(forward: Forward, number: int, count: int) -> dict[int, State]:
    """The states of a chain that have a graph, by depth."""
    edges: dict[int, dict[int, Any]] = {}
    for (chain, depth, stream), listener in forward.expected_gradients.items():
        listener.handle.remove()  # each product is a backward, whose gradients are not those of a loss
        if chain == number and depth >= 0 and listener.end is not None:
            edges.setdefault(depth, {})[stream] = listener.end
    found = {}
    for depth, streams in sorted(edges.items()):
        of = tuple(streams[stream] for stream in sorted(streams))
        nodes = {edge.node for edge in of}
        # Of streams that are made of one another a gradient counts what goes through the others twice.
        if len(of) > 1 and any(leads_to(edge.node, nodes - {edge.node}) for edge in of):
            continue
        metadata = [edge.node._input_metadata[edge.output_nr] for edge in of]
        shape = tuple(metadata[0].shape) if len(of) == 1 else (len(of), *metadata[0].shape)
        like = torch.empty(shape, dtype=metadata[0].dtype, device=metadata[0].device)
        found[depth] = State(of, like)
    if len(found) < 2:
        raise JacobianError(
            f"{len(found)} of the {count} states carry a gradient that is their own; a Jacobian needs two: a block runs under "
            "no_grad, on integers, or its streams are tensors that are made of one another"
        )
    return found


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
        # On the CPU, so that a seed means the same everywhere.
        generator = torch.Generator().manual_seed(seed)
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
            given = (cotangent * self._seen).to(self._target.like.dtype)
            return self._gradient(given).double() * self._moved

    def push(self, tangent: torch.Tensor) -> torch.Tensor:
        """J v: how a small change of the earlier state moves the later one."""
        with explained():
            # Built at the first product with J: those with Jᵀ alone need no second graph.
            if self._pulled is None:
                with torch.inference_mode(False), torch.enable_grad():
                    # u ↦ Jᵀu is linear, so its derivative does not depend on u, and zeros will do.
                    zeros = torch.zeros_like(self._target.like).requires_grad_()
                    self._pulled = zeros, self._gradient(zeros, create_graph=True)
                self._require_adjoint()
            zeros, pulled = self._pulled
            given = (tangent * self._moved).to(self._source.like.dtype)
            (found,) = torch.autograd.grad(pulled, zeros, given, retain_graph=True)
            return found.double() * self._seen

    def _gradient(self, cotangent: torch.Tensor, *, create_graph: bool = False) -> torch.Tensor:
        parts = torch.autograd.grad(
            list(self._target.edges),
            list(self._source.edges),
            self._target.parts(cotangent),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        if all(part is None for part in parts):
            raise JacobianError(UNLINKED)
        zeros = self._source.parts(torch.zeros_like(self._source.like))
        known = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        return torch.stack(known) if len(known) > 1 else known[0]

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
        limit = ADJOINT[self._target.like.dtype]
        if error > limit:
            self._pulled = None
            raise JacobianError(
                f"products with J and with Jᵀ disagree by {error:.1e} (limit {limit:.0e}): some operation's backward has no "
                "derivative of its own; load the model with attn_implementation='eager' or without custom kernels"
            )


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of some arrays of one shape, by QR."""
    return torch.linalg.qr(vectors.flatten(1).mT).Q.mT.view(-1, *vectors.shape[1:])
