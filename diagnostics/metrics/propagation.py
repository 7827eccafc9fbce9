"""How does the signal grow from step to step? Channel mean and variance, and what each branch adds."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import geometry
from depthscope.diagnostics.kernels import gradients as kernel
from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States

# The band that the hyper-connections paper draws about the mean cosine (Zhu et al., Fig. 3), and the median.
QUANTILES = (0.05, 0.5, 0.95)


@metric(
    symbol=r"\overline{\sigma_c^2}",
    dims="depth stream",
    scale="log",
    units="activation²",
    cite="brock2021characterizing",
    basis="stream",
    null="none: the scale is the model's; independent unit branches give l",
    estimator="over all real tokens, then the mean over channels",
)
def channel_variance(residual_states: States) -> xr.Variable:
    r"""Average over channels of the variance over tokens: what distinguishes them.

    .. math:: \tfrac{1}{d} \textstyle\sum_c \sigma_c^2
    """

    def measure(views: np.ndarray) -> np.ndarray:
        # Each view in float64, not all.
        return np.stack([kernel.channel_variance(view) for view in residual_states.rows(views)])

    return residual_states.over_depth(measure)


def _relative_size(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    size, added = (np.linalg.norm(x, axis=-1) for x in (before, after - before))
    # Relative to zero a step has no size. numpy warns of a division by zero, and not by NaN.
    return added / np.where(size > 0, size, np.nan)


def _mean_where_defined(values: np.ndarray) -> np.ndarray:
    """Mean over tokens (V, N) of what is not NaN; NaN where all is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    return np.where(defined, values, 0.0).sum(axis=-1) / np.where(count > 0, count, np.nan)


@metric(
    symbol=r"\|x_l - x_{l-1}\| / \|x_{l-1}\|",
    dims="depth stream",
    scale="log",
    cite=OURS,
    basis="stream",
    null="none in general: independent unit branches give the inverse square root of the depth",
    estimator="mean over real tokens",
    of_steps=True,
)
def branch_share(residual_states: States) -> xr.Variable:
    r"""Size of what a step adds relative to the state that it is added to; undefined at the embedding.

    .. math:: \|x_l - x_{l-1}\| / \|x_{l-1}\|

    Of a final norm it is the change of scale.
    """
    return residual_states.over_token_steps(_relative_size, _mean_where_defined)


# A quantity for the same reason: the mean and the band are of the same cosines.
@quantity
def adjacent_cosines(residual_states: States) -> xr.Variable:
    """Mean and 5, 50, 95 % quantiles over tokens of the cosine with the depth before."""

    def summary(cosines: np.ndarray) -> np.ndarray:
        return np.stack([_mean_and_quantiles(of_view) for of_view in cosines])

    return residual_states.over_token_steps(geometry.row_cosine, summary, ("summary",))


@quantity
def mean_adjacent_cosine(adjacent_cosines: xr.Variable) -> xr.Variable:
    """Mean cosine with the depth before, by depth and stream."""
    return adjacent_cosines.isel(summary=0)


def _mean_and_quantiles(cosines: np.ndarray) -> np.ndarray:
    known = cosines[np.isfinite(cosines)]  # a state of zero has no angle to another
    if not known.size:
        return np.full(1 + len(QUANTILES), np.nan)
    return np.array([known.mean(), *np.quantile(known, QUANTILES)])


@metric(
    symbol=r"\cos(x_{l-1}, x_l)",
    dims="depth stream",
    cite="zhu2024hyper",
    basis="stream",
    null=0.0,
    estimator="mean over real tokens",
    of_steps=True,
)
def adjacent_cosine(mean_adjacent_cosine: xr.Variable) -> xr.Variable:
    r"""Mean cosine of a token's state with its state at the depth before; undefined at the embedding.

    .. math:: \cos(x_{l-1}, x_l)

    Independent unit branches give √(l/(l+1)).
    """
    return mean_adjacent_cosine


@metric(
    symbol=r"q_p \cos(x_{l-1}, x_l)",
    dims="depth stream quantile",
    cite="zhu2024hyper",
    basis="stream",
    null="none: the quantiles of noise spread around 0 by one over the root of the number of features",
    estimator="quantiles over real tokens",
    smooth=False,
    of_steps=True,
)
def adjacent_cosine_band(adjacent_cosines: xr.Variable) -> xr.DataArray:
    """Band of the cosine with the depth before: 5, 50 and 95 % of the tokens are below."""
    # The first of the summary is the mean, see `adjacent_cosine`.
    band = adjacent_cosines.isel(summary=slice(1, None))
    return xr.DataArray(band.values, {"quantile": list(QUANTILES)}, (*band.dims[:-1], "quantile"))
