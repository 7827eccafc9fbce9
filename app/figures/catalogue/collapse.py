"""Do representations collapse across depth? Ranks, tokens that become equal, the shape of the cloud, its spectrum."""

from functools import partial
from typing import Any

from depthscope.app.figures.build.profile import Profile, build_profile
from depthscope.app.figures.build.spectrum import build_density, build_spectrum
from depthscope.app.figures.specification import Analyses, FigureKind, Lines, Selection

__all__ = ["KINDS"]

_SPECTRAL = ("scope", "tokens", "centering", "stream", "axis", "step")
_TOKENS = ("tokens", "stream", "axis", "step")
_ALONE = ("stream", "axis", "step")
_DEPTHS = ("scope", "tokens", "centering", "depths", "step")


def _rank(name: str, title: str, y_label: str, **more: Any) -> Profile:
    """Profile of a rank, with its streamed twin."""
    return Profile(name, f"{title} across depth", y_label, name, twin=f"streamed_{name}", **more)


_RANKS = (
    (_rank("effective_rank", "Effective rank", "effective rank"), _SPECTRAL),
    (_rank("participation_ratio", "Participation ratio", "participation ratio"), _SPECTRAL),
    (_rank("entropy_rank", "Matrix-entropy rank", "entropy rank"), _SPECTRAL),
    (_rank("stable_rank", "Stable rank", "stable rank"), _SPECTRAL),
    (
        Profile(
            "numerical_rank",
            "Numerical rank across depth",
            "numerical rank",
            "numerical_rank",
            note="Directions above the rounding of float32.",
        ),
        _SPECTRAL,
    ),
    (
        Profile(
            "intrinsic_dimension",
            "Intrinsic dimension across depth",
            "TwoNN dimension",
            "intrinsic_dimension",
            note="From the two nearest neighbours of each token, all tokens pooled.",
        ),
        _TOKENS,
    ),
)

_OF_TOKENS = (
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
        _TOKENS,
    ),
    (
        Profile(
            "token_cosine",
            "Token cosine across depth",
            "mean cosine of two tokens",
            "token_cosine",
            note="1 means that all tokens point the same way.",
        ),
        _SPECTRAL,
    ),
    (
        Profile(
            "dirichlet_energy",
            "Dirichlet energy across depth",
            "tr(XᵀLX) / ‖X‖²",
            "dirichlet_energy",
            scope="sequence",
            note="0 means that all tokens of a sequence are equal (oversmoothed).",
        ),
        _TOKENS,
    ),
    (
        Profile(
            "curvature",
            "Curvature of the path of tokens",
            "mean angle between steps",
            "curvature",
            scope="sequence",
            note="0 is a straight path from token to token, π one that goes back and forth.",
        ),
        _TOKENS,
    ),
    (
        Profile(
            "massive_activation",
            "Massive activations across depth",
            "largest |a| / median |a|",
            "massive_activation",
            log_y=True,
            thresholds=((1000.0, "massive: 1000 × median"),),
        ),
        _ALONE,
    ),
    (
        Profile(
            "massive_token_fraction",
            "Tokens with a massive activation",
            "share of the tokens",
            "massive_token_fraction",
            note="Above 100 and above 1000 × the median.",
        ),
        _ALONE,
    ),
)

_SHAPE = (
    (
        Profile(
            "top_energy",
            "Energy in the ten strongest directions",
            "share of the energy",
            "top_energy",
            twin="streamed_top_energy",
        ),
        _SPECTRAL,
    ),
    (
        Profile(
            "alpha_req",
            "Power law of the spectrum (α-ReQ)",
            "exponent α",
            "alpha_req",
            around="alpha_req_error",
            twin="streamed_alpha_req",
            note="Near 1 in good representations; centred is the published form.",
        ),
        _SPECTRAL,
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


def _kind(profile: Profile, uses: tuple[str, ...], section: str) -> FigureKind:
    return FigureKind(
        profile.name,
        profile.title,
        "collapse",
        (profile.metric,),
        partial(build, profile),
        uses,
        section,
        profile.also,
    )


KINDS = (
    *(_kind(profile, uses, "Ranks") for profile, uses in _RANKS),
    *(_kind(profile, uses, "Tokens") for profile, uses in _OF_TOKENS),
    FigureKind(
        "spectrum",
        "Singular values of the states",
        "collapse",
        ("singular_value",),
        build_spectrum,
        _DEPTHS,
        "Spectrum",
    ),
    FigureKind(
        "spectral_density",
        "Density of the eigenvalues of the states",
        "collapse",
        ("singular_value",),
        build_density,
        _DEPTHS,
        "Spectrum",
    ),
    *(_kind(profile, uses, "Spectrum") for profile, uses in _SHAPE),
)
