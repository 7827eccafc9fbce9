"""How similar are the states of two depths? CKA and angles between every two, and from each to the next."""

from functools import partial

import numpy as np
import xarray as xr

from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure

_matrix = partial(MatrixFigure, question="similarity")
_steps = partial(CurveFigure, question="similarity")
# The full range of an index, so that the colours of two runs can be compared; CKNNA may be negative.
_BOUNDED = (0.0, 1.0)


def _from_depth_before(matrix: xr.DataArray) -> xr.DataArray:
    """The first subdiagonal of a matrix over (depth, other_depth), along depth; NaN at the first depth."""
    # On all labels at once: the selection takes one of them afterwards, as of any other metric.
    matrix = matrix.transpose(..., "depth", "other_depth")
    values = np.full(matrix.shape[:-1], np.nan)
    values[..., 1:] = np.diagonal(matrix.values, offset=-1, axis1=-2, axis2=-1)
    return matrix.isel(other_depth=0, drop=True).copy(data=values)


def _with_step_angles(data: xr.Dataset) -> xr.Dataset:
    """The analysis with the angle to the depth before in place of those between every two."""
    if "angular_distance" not in data:
        return data
    angles = _from_depth_before(data["angular_distance"])
    # The standard error is that of the matrix.
    return data.drop_vars("angular_distance_stderr", errors="ignore").assign(angular_distance=angles)


cka = _matrix(
    "cka",
    "CKA of every two depths",
    "linear CKA",
    limits=_BOUNDED,
)
angular_distance = _matrix(
    "angular_distance",
    "Angle between every two depths",
    "arccos(cos) / π",
    limits=(0.0, None),
    note="Mean over tokens.",
)
procrustes = _matrix(
    "procrustes",
    "Procrustes distance of every two depths",
    "Procrustes distance",
    limits=(0.0, None),
)
mutual_knn = _matrix(
    "mutual_knn",
    "Mutual nearest neighbours of every two depths",
    "share of neighbours",
    limits=_BOUNDED,
)
cknna = _matrix(
    "cknna",
    "CKNNA of every two depths",
    "CKNNA",
    limits=(None, 1.0),
)
adjacent_cka = _steps(
    "adjacent_cka",
    "CKA with the depth before",
    "linear CKA with depth − 1",
)
adjacent_cosine = _steps(
    "adjacent_cosine",
    "Cosine with the depth before",
    "cos(x at depth − 1, x)",
    around="adjacent_cosine_band",
    note="The residual stream turns where it is low.",
)
block_influence = _steps(
    "block_influence",
    "Block influence across depth",
    "1 − cos(in, out)",
    note="Near 0: the block hardly changes the state.",
)
stream_cosine = _steps(
    "stream_cosine",
    "Cosine between streams across depth",
    "mean cosine of two streams",
)
closest_stream_cosine = _steps(
    "closest_stream_cosine",
    "Cosine of the two most similar streams across depth",
    "largest mean cosine of two streams",
)
stream_cka = _steps(
    "stream_cka",
    "CKA between streams across depth",
    "mean linear CKA of two streams",
)
adjacent_angle = _steps(
    "adjacent_angle",
    "Angle to the depth before",
    "arccos(cos) / π",
    metric="angular_distance",
    derive=_with_step_angles,
    note="Mean over tokens; near 0: the block does nothing.",
)


variance_growth = _steps(
    "variance_growth",
    "Growth of the state beyond that of independent branches",
    "‖state‖² / sum of the squares of its parts",
    note="Above 1 the branches add up, below 1 they cancel one another.",
)
relative_turn = _steps(
    "relative_turn",
    "Turn of each step, relative to independent branches",
    "angle / that of independent branches",
    note="Near 0: the step changes at most the size of the state.",
)
effective_depth = _steps(
    "effective_depth",
    "Effective depth: steps that turn the state as independent branches would",
    "steps",
    note="Against independent branches of the size of the first state; half of their turn counts half.",
)
step_spread = _steps(
    "step_spread",
    "Share of each step that depends on the token",
    "1 − ‖mean step‖² / mean ‖step‖²",
    note="0: the step adds the same vector to every token.",
)
