"""How far does one step move each module? Norms of weights and of their gradients, and the relative update."""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS, Range, metric
from depthscope.diagnostics.quantities.registry import ratio
from depthscope.diagnostics.schema import FROZEN_MODULES

OF_A_MODULE = "exact, over all parameters that the module owns"


@metric(
    symbol=r"\|W_m\|_F",
    dims="weight",
    scale="log",
    cite="you2017large",
    basis="invariant",
    null="none: the scale is the initialisation's; iid entries of variance s² give s times the root of their number",
    estimator=OF_A_MODULE,
)
def weight_norm(weight_square_norm: xr.DataArray) -> xr.DataArray:
    r"""Norm of the weights of a module.

    .. math:: \|W_m\|_F

    As they stand at the end of the step. A parameter that two modules share counts for the first of them.
    """
    # Statistics store squares, which add up over the parameters of a module.
    return weight_square_norm**0.5


@metric(
    symbol=r"\|\partial \mathcal{L} / \partial W_m\|_F",
    dims="weight",
    scale="log",
    units="loss per weight",
    cite="pascanu2013difficulty",
    basis="invariant",
    null="none: the scale is the loss's; compare modules",
    estimator=OF_A_MODULE,
)
def weight_gradient_norm(weight_gradient_square_norm: xr.DataArray) -> xr.DataArray:
    r"""Norm of the gradient of the loss with respect to the weights of a module.

    .. math:: \|\partial \mathcal{L} / \partial W_m\|_F

    Accumulated over the backwards of the step, before clipping, divided by the loss scale where it is known.
    """
    return weight_gradient_square_norm**0.5


@metric(
    symbol=r"\|\Delta W_m\|_F / \|W_m\|_F",
    dims="weight",
    scale="log",
    # As in the verdicts `untrained_module` and `large_update`.
    healthy=Range(low=1e-7, high=0.1, source=OURS),
    cite="bernstein2020distance",
    basis="invariant",
    null="none: the learning rate decides; the rule of thumb is 1e-3 (Stanford CS231n, course notes)",
    estimator=f"{OF_A_MODULE}; the change during one step of the optimizer",
)
def update_ratio(weight_update_square_norm: xr.DataArray, weight_square_norm: xr.DataArray) -> xr.DataArray:
    r"""Change of a module's weights in one step of the optimizer, relative to the weights.

    .. math:: \|\Delta W_m\|_F / \|W_m\|_F

    What a network computes changes by at most about the product over its layers of one plus this, less one
    (Bernstein et al. 2020), so deeper networks bear less of it. NaN where no optimizer ran during the step, 0
    where it ran and left the module as it was. NaN too for the step in which a module leaves zero, where all of it is change:
    so begin adapters, gates and output projections on purpose.
    """
    frozen = weight_update_square_norm.attrs.get(FROZEN_MODULES)
    # Sums over the same numbers, hence equal to the last bit where the weights before were zero, and not otherwise.
    from_zero = weight_update_square_norm == weight_square_norm
    found = (ratio(weight_update_square_norm, weight_square_norm) ** 0.5).where(~from_zero)
    return found.assign_attrs({FROZEN_MODULES: frozen}) if frozen else found
