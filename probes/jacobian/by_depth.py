"""How do each block and all together stretch small changes of the state? Singular values and their spread, by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import JACOBIANS, declared
from depthscope.probes.jacobian.estimators import spectral_density, top_singular_values
from depthscope.probes.jacobian.operator import JacobianOperator, operator_between
from depthscope.probes.jacobian.state_graph import Routing, Selection, Tokens, state_graph
from depthscope.probes.session.options import ModelOptions, Options, takes_options

OVERSAMPLING, POWER = 6, 2
STEPS, PROBES = 10, 6
"""Of the two estimators, whose errors are in the result: fewer than their own defaults, since there is one of each a block."""

Numbers = dict[str, np.ndarray | float]


@takes_options(ModelOptions)
def jacobians_by_depth(
    model: nn.Module,
    batch: Any,
    *,
    values: int = 8,
    chain: str | None = None,
    tokens: Tokens = "all",
    positions: Sequence[int] | None = None,
    routing: Routing = "full",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    r"""The largest singular values of every block's Jacobian and of the whole chain's, and how far σ² spreads.

    .. math:: J_l = \partial x_l / \partial x_{l-1}, \quad J = \partial x_L / \partial x_0, \quad
        m_1 = \tfrac{1}{n} \sum_i \sigma_i^2, \quad v = \tfrac{1}{n} \sum_i \sigma_i^4 - m_1^2

    over the n directions of the earlier state. Dynamical isometry is m₁ = 1 and v = 0: every small change keeps its size.

    ``model, batch, chain, tokens, positions, routing``: as in `probes.jacobian.jacobian`; ``tokens="all"`` costs one
    backward a product.
    ``progress``: called with (what, number done, number in all).
    Returns: ``singular_value`` (depth, order) with ``_error``, its residual; ``mean_square`` and ``square_variance``
    (depth) with their standard errors over probes; depth l is the Jacobian from the state at l − 1 to that at l. The
    same of the whole chain with ``whole_`` before the name.

    References
    ----------
    Pennington, Schoenholz and Ganguli 2017, "Resurrecting the sigmoid in deep learning through dynamical isometry"
    (arXiv 1711.04735); Halko, Martinsson and Tropp 2011 for the singular values; Ubaru, Chen and Saad 2017 for the moments.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
    >>> with torch.no_grad():
    ...     for layer in model:
    ...         _ = layer.weight.copy_(torch.diag(torch.tensor([2.0, 0.5])))
    >>> found = jacobians_by_depth(model, torch.ones(1, 2), values=2)
    >>> found.singular_value.values.round(6).tolist(), found.whole_singular_value.values.round(6).tolist()
    ([[2.0, 0.5], [2.0, 0.5]], [4.0, 0.25])
    """
    if values < 1:
        raise InputError(f"got values={values}; expected how many singular values are wanted, 1 or more")
    selection = Selection(Options(**options, max_sequences=1), chain, tokens, positions, routing)
    graph = state_graph(model, batch, None, None, selection)
    depths = range(graph.start + 1, graph.stop + 1)
    spans = [*((depth - 1, depth) for depth in depths), (graph.start, graph.stop)]
    found = []
    for number, (start, stop) in enumerate(spans):
        if progress is not None:
            progress(f"the Jacobian from depth {start} to {stop}", number, len(spans))
        # One operator at a time: each keeps a graph of its own for the products with J.
        operator = operator_between(graph, start, stop)
        found.append(_measured(operator, values, seed))
    return _dataset(found, list(depths), operator, selection, seed)


def _measured(operator: JacobianOperator, values: int, seed: int) -> Numbers:
    top = top_singular_values(
        operator, min(values, *operator.shape), oversampling=OVERSAMPLING, power=POWER, seed=seed
    )
    density = spectral_density(operator, steps=STEPS, probes=PROBES, seed=seed)
    return {
        # A state of fewer directions has no further values.
        "singular_value": _padded(top.values, values),
        "singular_value_error": _padded(top.errors, values),
        "mean_square": density.mean.value,
        "mean_square_error": density.mean.stderr,
        "square_variance": density.variance.value,
        "square_variance_error": density.variance.stderr,
    }


def _padded(numbers: np.ndarray, count: int) -> np.ndarray:
    return np.pad(np.asarray(numbers, dtype=np.float64), (0, count - len(numbers)), constant_values=np.nan)


def _dataset(
    found: Sequence[Numbers], depths: list[int], operator: JacobianOperator, selection: Selection, seed: int
) -> xr.Dataset:
    *blocks, whole = found
    variables: dict[str, Any] = {}
    for name in whole:
        dims = ("order",) if name.startswith("singular_value") else ()
        variables[name] = (("depth", *dims), np.array([block[name] for block in blocks]))
        variables[f"whole_{name}"] = (dims, whole[name])
    orders = np.arange(1, len(np.atleast_1d(whole["singular_value"])) + 1)
    attrs = {
        "tokens": selection.tokens,
        "routing": selection.routing,
        "chain": selection.chain or "",
        "num_tokens": operator.num_tokens,
        "num_directions": operator.shape[1],
        "dtype": str(operator.dtype).removeprefix("torch."),
        "seed": seed,
        "estimators": f"randomised range finding, {OVERSAMPLING} more vectors, {POWER} power iterations; "
        f"stochastic Lanczos quadrature, {PROBES} probes of {STEPS} steps",
    }
    return declared(xr.Dataset(variables, {"depth": depths, "order": orders}, attrs), JACOBIANS)
