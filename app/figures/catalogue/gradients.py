"""How large are the states, their gradients and the steps of the weights? Norms, what each step adds, weights."""

from functools import partial
from typing import Any

from depthscope.app.figures.build.profile import Profile, build_profile
from depthscope.app.figures.specification import Analyses, FigureKind, Lines, Selection

__all__ = ["KINDS"]

_REDUCTION = "The loss reduction of the run scales the whole curve."

_STATES = (
    Profile(
        "gradient_norm",
        "Gradient norm across depth",
        "‖∂loss / ∂state‖",
        "gradient_norm",
        log_y=True,
        note=_REDUCTION,
    ),
    Profile(
        "backward_gain",
        "Backward gain across depth",
        "gradient norm / that of the last state",
        "backward_gain",
        log_y=True,
        thresholds=((0.1, "vanishing: 0.1"), (10.0, "exploding: 10")),
        note="Gradient norm relative to the last state.",
    ),
    Profile(
        "relative_gradient",
        "Sensitivity to a relative change of the state",
        "√Σ ‖gradient‖² ‖state‖²",
        "relative_gradient",
        log_y=True,
        note="Token by token; it stays level where branches normalise their input. " + _REDUCTION,
    ),
    Profile(
        "residual_norm",
        "Residual norm across depth",
        "rms norm of a token",
        "residual_norm",
        log_y=True,
        note="Root mean square over tokens.",
    ),
    Profile(
        "gradient_rank",
        "Rank of the gradients across depth",
        "effective rank",
        "gradient_rank",
        note="How many directions the gradients of the tokens use.",
    ),
    Profile(
        "gradient_cosine",
        "Agreement of the gradients across depth",
        "mean cosine of two gradients",
        "gradient_cosine",
    ),
)

_PROPAGATION = (
    Profile(
        "channel_squared_mean",
        "What all tokens share: squared mean of a channel",
        "mean over channels of μ²",
        "channel_squared_mean",
        log_y=True,
    ),
    Profile(
        "channel_variance",
        "What tells tokens apart: variance of a channel",
        "mean over channels of σ²",
        "channel_variance",
        log_y=True,
    ),
    Profile(
        "branch_variance",
        "Variance of what each step adds",
        "mean over channels of σ²",
        "branch_variance",
        log_y=True,
    ),
    Profile(
        "branch_share",
        "Size of what each step adds",
        "‖added‖ / ‖state before‖",
        "branch_share",
        log_y=True,
        note="Near 0: the step hardly changes the state.",
    ),
)

_WEIGHTS = (
    Profile(
        "update_ratio",
        "How far one step moves each module",
        "‖ΔW‖ / ‖W‖",
        "update_ratio",
        along="weight",
        log_y=True,
        note="One step of the optimiser.",
    ),
    Profile(
        "weight_gradient_ratio",
        "Gradient of each module relative to its weights",
        "‖∂loss / ∂W‖ / ‖W‖",
        "weight_gradient_ratio",
        along="weight",
        log_y=True,
        note=_REDUCTION,
    ),
    Profile(
        "weight_gradient_norm",
        "Gradient norm of each module",
        "‖∂loss / ∂W‖",
        "weight_gradient_norm",
        along="weight",
        log_y=True,
        note=_REDUCTION,
    ),
    Profile("weight_norm", "Norm of each module", "‖W‖", "weight_norm", along="weight", log_y=True),
)


def build(profile: Profile, analyses: Analyses, **selection: Any) -> Lines:
    """Figure of one norm across depth.

    Parameters
    ----------
    profile : Profile
        What to draw.
    analyses : mapping
        Run name → analysis.
    **selection : str or int
        Fields of `Selection`.

    Returns
    -------
    Lines
    """
    return build_profile(profile, analyses, Selection.of(selection))


def _kind(profile: Profile, section: str) -> FigureKind:
    uses = ("axis", "step") if profile.along == "weight" else ("stream", "axis", "step")
    return FigureKind(
        profile.name, profile.title, "gradients", (profile.metric,), partial(build, profile), uses, section
    )


KINDS = (
    *(_kind(profile, "States and gradients") for profile in _STATES),
    *(_kind(profile, "Signal propagation") for profile in _PROPAGATION),
    *(_kind(profile, "Weights") for profile in _WEIGHTS),
)
