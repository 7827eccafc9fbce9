"""Which figures need more than the declaration of their metric? One definition of each; all other metrics have a default."""

from functools import partial

import numpy as np
import xarray as xr

from depthscope.app.figures.build.curve_figure import CurveFigure, SpectrumFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure

_collapse = partial(CurveFigure, question="collapse")
_heads = partial(MatrixFigure, columns="head", limits=(0.0, 1.0), question="collapse")

effective_rank = _collapse("effective_rank", "Effective rank across depth", "effective rank")
corrected_participation_ratio = _collapse(
    "corrected_participation_ratio",
    "Participation ratio of the population across depth",
    "participation ratio",
    note="Without the bias of the sampled tokens.",
)
# These three compare the tokens of one sequence: the caption counts those of one, not of all ("data", the default).
dong_residual = _collapse(
    "dong_residual",
    "Distance to identical tokens across depth",
    "r(X) / ‖X‖",
    scope="sequence",
    note="0 means that all tokens of a sequence are equal.",
)
token_cosine = _collapse(
    "token_cosine",
    "Token cosine across depth",
    "mean cosine of two tokens",
    note="1 means that all tokens point the same way.",
)
# Sun et al. 2024 call an activation massive above 100 and above 1000 × the median; the metric is a ratio to the median.
massive_activation = _collapse(
    "massive_activation",
    "Massive activations across depth",
    "largest |a| / median |a|",
    thresholds=((1000.0, "massive: 1000 × median"),),
)
attention_entropy = _heads(
    "attention_entropy",
    "Entropy of attention by head",
    "share of uniform",
    note="0 where each query attends to one token alone.",
)
sink_mass = _heads("sink_mass", "Attention on the first token by head", "weight on the first token")
spectrum = SpectrumFigure(
    "spectrum", "Singular values of the states", metric="singular_value", question="collapse"
)

_similarity = partial(CurveFigure, question="similarity")
_matrix = partial(MatrixFigure, question="similarity")
# The full range of an index, so that the colours of two runs can be compared.
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


cka = _matrix("cka", "CKA of every two depths", "linear CKA", limits=_BOUNDED)
angular_distance = _matrix(
    "angular_distance",
    "Angle between every two depths",
    "arccos(cos) / π",
    limits=(0.0, None),
    note="Mean over tokens.",
)
adjacent_cka = _similarity("adjacent_cka", "CKA with the depth before", "linear CKA with depth − 1")
adjacent_cosine = _similarity(
    "adjacent_cosine",
    "Cosine with the depth before",
    "cos(x at depth − 1, x)",
    around="adjacent_cosine_band",
    note="The residual stream turns where it is low.",
)
block_influence = _similarity(
    "block_influence",
    "Block influence across depth",
    "1 − cos(in, out)",
    note="Near 0: the block hardly changes the state.",
)
stream_cosine = _similarity(
    "stream_cosine", "Cosine between streams across depth", "mean cosine of two streams"
)
adjacent_angle = _similarity(
    "adjacent_angle",
    "Angle to the depth before",
    "arccos(cos) / π",
    metric="angular_distance",
    derive=_with_step_angles,
    note="Mean over tokens; near 0: the block does nothing.",
)

_mixing = partial(CurveFigure, question="mixing")
# The gain of every doubly stochastic matrix.
_UNCHANGED = ((1.0, "1"),)


mixing_gain = _mixing(
    "mixing_gain",
    "Gain of each connection",
    "Amax gain",
    over="direction",
    thresholds=_UNCHANGED,
    note="Largest signed row sum (forward) or column sum (backward) of H_res.",
)
composite_gain = _mixing(
    "composite_gain",
    "Composite gain from the embedding",
    "Amax gain of the product",
    over="direction",
    thresholds=_UNCHANGED,
    note="Product of H_res from the first connection through this one, later layers on the left; "
    "multiplied for each token, then reduced.",
)
deflated_gain = _mixing(
    "deflated_gain",
    "Stream collapse of the composite",
    "σ₁ of the product on 1⊥",
    note="Below 0.01 every stream carries the same signal.",
)
read_share = _mixing("read_share", "What each sublayer reads", "share of the read weight", over="stream")
signal_share = _mixing(
    "signal_share", "Whose signal each sublayer reads", "share of the signal read", over="stream"
)
write_share = _mixing("write_share", "Where each sublayer writes", "share of the write weight", over="stream")
mixing_singular_value = _mixing(
    "mixing_singular_value", "Singular values of each connection", "singular value of H_res", over="component"
)
# From 0 on, the value of a sublayer that is not read; the largest is the data's own.
depth_kernel = MatrixFigure(
    "depth_kernel",
    "Which sublayer reads which",
    "mean |M|",
    rows="connection",
    columns="other_connection",
    x_label="source: output of connection",
    y_label="reader: input of connection",
    limits=(0.0, None),
    below=True,
    note="Does not depend on the stream basis; mean over tokens.",
    question="mixing",
)

_gradients = partial(CurveFigure, question="gradients")
# A loss that is summed over tokens has gradients larger by their number than one that is averaged.
_REDUCTION = "The loss reduction of the run scales the whole curve."

gradient_norm = _gradients("gradient_norm", "Gradient norm across depth", "‖∂loss / ∂state‖", note=_REDUCTION)
# The verdicts judge another number, see the note: limits on this one would contradict them.
backward_gain = _gradients(
    "backward_gain",
    "Backward gain across depth",
    "gradient norm / that of the last state",
    note="Of a Pre-LN network 10 to 120 at the embedding is normal, where the states are as much smaller: the gradient "
    "times the size of the state is judged.",
)
relative_gradient = _gradients(
    "relative_gradient",
    "Sensitivity to a relative change of the state",
    "√Σ ‖gradient‖² ‖state‖²",
    note="Token by token; constant across depth in pre-norm networks. " + _REDUCTION,
)
residual_norm = _gradients(
    "residual_norm", "Residual norm across depth", "rms norm of a token", note="Root mean square over tokens."
)
gradient_rank = _gradients(
    "gradient_rank",
    "Rank of the gradients across depth",
    "effective rank",
    note="How many directions the gradients of the sequences use.",
)
branch_share = _gradients(
    "branch_share",
    "Size of what each step adds",
    "‖added‖ / ‖state before‖",
    note="Near 0: the step hardly changes the state.",
)
