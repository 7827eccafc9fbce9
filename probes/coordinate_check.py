"""Does training change the states by as much at every width or depth? Models of several sizes, a few steps each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics import schema
from depthscope.diagnostics.experiments import declared
from depthscope.diagnostics.experiments.scaling import OUTPUT, POINTS, SCALING, with_exponents
from depthscope.probes.interventions.model_under_test import EVERY_SEQUENCE
from depthscope.probes.interventions.predictions import output_values
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.loss_graph import Loss, loss_value
from depthscope.probes.model.modules import require_module
from depthscope.probes.one_shot import measure
from depthscope.probes.session.model_call import call_model
from depthscope.probes.session.options import ModelOptions, Options, takes_options

Make: TypeAlias = Callable[[int], nn.Module]
OptimizerOf: TypeAlias = Callable[[nn.Module, int], torch.optim.Optimizer]

# Places of models of different depth: shares of it, the embedding first.
SHARES = {"the embedding": 0.0, "a quarter": 0.25, "half": 0.5, "three quarters": 0.75, "the last state": 1.0}
# Where a model has no state at each of them, its ends alone.
ENDS = {"the embedding": 0.0, "the last state": 1.0}


class ScalingError(CaptureError):
    """Models that cannot be compared over their size."""


@takes_options(ModelOptions)
def coordinate_check(
    make: Make,
    batch: Any,
    sizes: Sequence[int] = (16, 32, 64, 128, 256),
    *,
    over: str = "width",
    seeds: int = 3,
    steps: int = 5,
    learning_rate: float = 1e-3,
    optimizer: OptimizerOf | None = None,
    loss: Loss | None = None,
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    r"""Coordinate check: train models of several sizes a few steps, and fit how the change of their states scales.

    .. math:: \mathrm{rms}(x_l^{(t)} - x_l^{(0)}) \propto \mathrm{size}^{\,b_l}

    With a parametrisation that transfers over width, every b is 0 (Yang et al. 2022, 2203.03466; the spectral condition of
    2310.17813 gives the same): the states change by an amount that does not depend on the width. With one learning rate for
    all matrices, Adam moves the hidden states by about width^1 or less; below 0, wide models learn nothing there.

    Parameters
    ----------
    make : callable
        ``make(size)`` returns a fresh model. It is called under a seed of its own; the random state outside is not changed.
    batch : mapping, tensor or tuple
        One batch, for training and measuring, as in `capture`.
    sizes : sequence of int
        Widths, or depths; five or more, of which each is at least double the one before: three have an error too, but their
        interval reaches 12.7 standard errors to each side.
    over : str
        What the sizes are: ``"width"`` or ``"depth"``.
    seeds : int
        Models of each size.
    steps : int
        Training steps.
    learning_rate : float
        Of Adam without weight decay, the same for all parameters, where `optimizer` is not given.
    optimizer : callable, optional
        ``optimizer(model, size)`` returns that of the model.
    loss : callable, optional
        ``loss(output, batch) -> scalar``; by default the output's own.
    **options
        Each option of `Options`.

    Returns
    -------
    Dataset
        ``start`` and ``change`` (root mean square of the entries) by size, seed and place: each depth, or five shares of it
        where the sizes have different depths, and the output; ``change_exponent`` and ``start_exponent`` by place with
        ``_error``, ``_low``, ``_high`` (95 %, Student's t over sizes); ``loss`` by step.

    Raises
    ------
    ScalingError
        For fewer than two sizes, models whose states cannot be compared, or no trainable parameter.
    CaptureError
        Where a model cannot be read, or has no loss.

    Examples
    --------
    >>> import depthscope as ds
    >>> def make(width):
    ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 1))
    >>> x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    >>> found = ds.coordinate_check(
    ...     make, x, (16, 32, 64), layers="1", loss=lambda y, _: ((y - 1) ** 2).mean(), seeds=1, streams=1
    ... )  # doctest: +SKIP
    """
    sizes = [int(size) for size in sizes]
    if len(set(sizes)) < 2 or len(set(sizes)) < len(sizes) or min(sizes) < 1:
        raise ScalingError(
            f"got the sizes {sizes}; expected two or more different ones, five or more for a narrow interval"
        )
    if seeds < 1 or steps < 1:
        raise ScalingError(f"got {seeds} seeds and {steps} steps; expected one or more of each")
    rule = optimizer or (lambda model, size: torch.optim.Adam(model.parameters(), lr=learning_rate))
    settings = Options(**options, max_sequences=EVERY_SEQUENCE)
    found = [
        [_one_model(make, batch, size, seed, steps, rule, loss, settings) for seed in range(seeds)]
        for size in sizes
    ]
    # Without the output, which comes after the last state.
    counts = {len(model.start) - 1 for of_size in found for model in of_size}
    shares = SHARES if min(counts) >= len(SHARES) else ENDS
    places = [f"depth {depth}" for depth in range(min(counts))] if len(counts) == 1 else list(shares)

    def at_places(values: np.ndarray) -> np.ndarray:
        if len(counts) == 1:
            return values
        return values[[*(round(share * (len(values) - 2)) for share in shares.values()), -1]]

    start = np.array([[at_places(model.start) for model in row] for row in found])
    change = np.array([[at_places(model.change) for model in row] for row in found])
    losses = np.array([[model.losses for model in row] for row in found])
    points = xr.Dataset(
        {"start": (POINTS, start), "change": (POINTS, change), "loss": (("size", "seed", "step"), losses)},
        {"size": sizes, "seed": np.arange(seeds), "place": np.array([*places, OUTPUT], dtype=object)},
        {"over": over, "steps": steps, "interval": "95 %, Student's t over sizes"},
    )
    return declared(with_exponents(points), SCALING)


@dataclass
class _Trained:
    """Root mean squares of the states and the output at the start, those of their changes, and the losses."""

    start: np.ndarray
    change: np.ndarray
    losses: list[float]


def _one_model(
    make: Make,
    batch: Any,
    size: int,
    seed: int,
    steps: int,
    rule: OptimizerOf,
    loss: Loss | None,
    options: Options,
) -> _Trained:
    """Make a model, train it, and compare its states before and after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(size)
        require_module(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ScalingError(f"the model of size {size} has no parameter to train")
        before = _states(model, batch, options)
        losses = _trained(model, batch, rule(model, size), steps, loss)
        after = _states(model, batch, options)
    if [state.shape for state in before] != [state.shape for state in after]:
        raise ScalingError(
            f"the states of the model of size {size} have other shapes after training than before"
        )
    start = np.array([_rms(state) for state in before])
    change = np.array([_rms(new - old) for old, new in zip(before, after, strict=True)])
    return _Trained(start, change, losses)


def _states(model: nn.Module, batch: Any, options: Options) -> list[torch.Tensor]:
    """Every state of the first chain and the output, in evaluation mode: dropout is no change by training."""
    with _evaluating(model), torch.no_grad():
        run = measure(model, batch, options, described=True)
        output = output_values(call_model(model, batch))
    trace = schema.chain_dataset(run, "trace", schema.chains(run)[0])
    if trace is None or "residual" not in trace:
        raise ScalingError("the model shows no states with raw numbers; name its blocks with layers=")
    states = [torch.from_numpy(np.asarray(state, dtype=np.float64)) for state in trace["residual"].values]
    return [*states, output.double().cpu()]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _trained(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, steps: int, loss: Loss | None
) -> list[float]:
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            value = loss_value(call_model(model, batch), batch, loss, required=True)
            assert value is not None
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
    return losses


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
