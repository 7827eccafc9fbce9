"""How large are the states, their gradients and the steps of the weights? Norms on a log axis, and the backward gain."""

from functools import partial
from typing import Any

from app.figures.profile import Profile, build_profile
from app.figures.specification import Analyses, FigureKind, Lines, Selection

__all__ = ["KINDS"]

_PROFILES = (
    Profile(
        "gradient_norm",
        "Gradient norm across depth",
        "‖∂loss / ∂state‖",
        "gradient_norm",
        log_y=True,
        note="The loss reduction of the run scales the whole curve.",
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
        "residual_norm",
        "Residual norm across depth",
        "rms norm of a token",
        "residual_norm",
        log_y=True,
        note="Root mean square over tokens.",
    ),
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
        note="The loss reduction of the run scales the whole curve.",
    ),
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


KINDS = tuple(
    FigureKind(
        p.name,
        p.title,
        "gradients",
        (p.metric,),
        partial(build, p),
        ("axis", "step") if p.along == "weight" else ("stream", "axis", "step"),
    )
    for p in _PROFILES
)
