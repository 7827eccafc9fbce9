"""Do representations collapse across depth? Ranks, token similarity, massive activations."""

from functools import partial
from typing import Any

from app.figures.profile import Profile, build_profile
from app.figures.specification import Analyses, FigureKind, Lines, Selection

__all__ = ["KINDS"]

_RANK_USES = ("scope", "tokens", "centering", "stream", "axis", "step")

_PROFILES = (
    (
        Profile("effective_rank", "Effective rank across depth", "effective rank", "effective_rank"),
        _RANK_USES,
    ),
    (
        Profile(
            "dong_residual",
            "Distance to identical tokens across depth",
            "r(X) / ‖X‖",
            "dong_residual",
            scope="sequence",
            log_y=True,
            note="0 means that all tokens of a sequence are equal.",
        ),
        ("tokens", "stream", "axis", "step"),
    ),
    (
        Profile(
            "token_cosine",
            "Token cosine across depth",
            "mean cosine of two tokens",
            "token_cosine",
            note="1 means that all tokens point the same way.",
        ),
        _RANK_USES,
    ),
    (
        Profile(
            "participation_ratio",
            "Participation ratio across depth",
            "participation ratio",
            "participation_ratio",
        ),
        _RANK_USES,
    ),
    (
        Profile("entropy_rank", "Matrix-entropy rank across depth", "entropy rank", "entropy_rank"),
        _RANK_USES,
    ),
    (Profile("stable_rank", "Stable rank across depth", "stable rank", "stable_rank"), _RANK_USES),
    (
        Profile(
            "massive_activation",
            "Massive activations across depth",
            "largest |a| / median |a|",
            "massive_activation",
            log_y=True,
            thresholds=((1000.0, "massive: 1000 × median"),),
        ),
        ("stream", "axis", "step"),
    ),
)


def build(profile: Profile, analyses: Analyses, **selection: Any) -> Lines:
    """Figure of one collapse metric across depth.

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
    FigureKind(p.name, p.title, "collapse", (p.metric,), partial(build, p), uses) for p, uses in _PROFILES
)
