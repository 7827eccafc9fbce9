"""How far has training moved the weights from those of the first checkpoint? Of a history of checkpoints."""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.registry import ratio


@metric(
    symbol=r"\|W_m^{(t)} - W_m^{(0)}\|_F / \|W_m^{(0)}\|_F",
    dims="weight",
    label="distance from the first weights",
    scale="log",
    cite=OURS,
    basis="invariant",
    null="none: the learning rate and the number of steps decide; compare modules",
    estimator="exact, over all parameters that the module owns",
)
def first_weight_distance(
    weight_first_square_distance: xr.DataArray, weight_first_square_norm: xr.DataArray
) -> xr.DataArray:
    r"""Distance of a module's weights from those of the first checkpoint, relative to these.

    .. math:: \|W_m^{(t)} - W_m^{(0)}\|_F / \|W_m^{(0)}\|_F

    NaN where the first weights are zero, or have another shape.
    """
    return ratio(weight_first_square_distance, weight_first_square_norm) ** 0.5
