"""How large are the states, their gradients and the steps of the weights? Norms, what each step adds, weights."""

from functools import partial

from depthscope.app.figures.build.curve_figure import CurveFigure

_states = partial(CurveFigure, question="gradients", section="States and gradients")
_propagation = partial(CurveFigure, question="gradients", section="Signal propagation")
_weights = partial(CurveFigure, question="gradients", section="Weights")

# A loss that is summed over tokens has gradients larger by their number than one that is averaged.
_REDUCTION = "The loss reduction of the run scales the whole curve."

gradient_norm = _states(
    "gradient_norm",
    "Gradient norm across depth",
    "‖∂loss / ∂state‖",
    note=_REDUCTION,
)
# The verdicts judge another number, see the note: limits on this one would contradict them.
backward_gain = _states(
    "backward_gain",
    "Backward gain across depth",
    "gradient norm / that of the last state",
    note="Of a Pre-LN network 10 to 120 at the embedding is normal, where the states are as much smaller: the gradient "
    "times the size of the state is judged.",
)
relative_gradient = _states(
    "relative_gradient",
    "Sensitivity to a relative change of the state",
    "√Σ ‖gradient‖² ‖state‖²",
    note="Token by token; constant across depth in pre-norm networks. " + _REDUCTION,
)
residual_norm = _states(
    "residual_norm",
    "Residual norm across depth",
    "rms norm of a token",
    note="Root mean square over tokens.",
)
gradient_rank = _states(
    "gradient_rank",
    "Rank of the gradients across depth",
    "effective rank",
    note="How many directions the gradients of the sequences use.",
)
channel_variance = _propagation(
    "channel_variance",
    "What tells tokens apart: variance of a channel",
    "mean over channels of σ²",
)
branch_share = _propagation(
    "branch_share",
    "Size of what each step adds",
    "‖added‖ / ‖state before‖",
    note="Near 0: the step hardly changes the state.",
)
update_ratio = _weights(
    "update_ratio",
    "How far one step moves each module",
    "‖ΔW‖ / ‖W‖",
    note="One step of the optimizer.",
)
weight_gradient_norm = _weights(
    "weight_gradient_norm",
    "Gradient norm of each module",
    "‖∂loss / ∂W‖",
    note=_REDUCTION,
)
weight_norm = _weights(
    "weight_norm",
    "Norm of each module",
    "‖W‖",
)
