"""What do the connections do to the streams? Gains, composites, spectra and the collapse of their product."""

from functools import partial
from typing import Any

from app.figures.matrix import Matrix, build_matrix
from app.figures.profile import Profile, build_profile
from app.figures.specification import Analyses, FigureKind, Heatmap, Lines, Selection

__all__ = ["KINDS"]

_GAIN_LIMITS = ((1.0, "1"), (10.0, "warn: 10"), (100.0, "fail: 100"))
_GAIN_USES = ("direction", "reduction", "axis", "step")
_REDUCED = ("reduction", "axis", "step")


def _along(name: str, title: str, y_label: str, **more: Any) -> Profile:
    """Profile across connections of the variable of the same name."""
    return Profile(name, title, y_label, name, along="connection", **more)


_PROFILES = (
    (
        _along(
            "mixing_gain",
            "Gain of each connection",
            "Amax gain",
            over="direction",
            log_y=True,
            thresholds=_GAIN_LIMITS,
            note="Largest signed row sum (forward) or column sum (backward) of H_res.",
        ),
        _GAIN_USES,
    ),
    (
        _along(
            "composite_gain",
            "Composite gain from the embedding",
            "Amax gain of the product",
            over="direction",
            log_y=True,
            thresholds=_GAIN_LIMITS,
            note="Product of H_res from the first connection through this one, later layers on the left; "
            "multiplied for each token, then reduced.",
        ),
        _GAIN_USES,
    ),
    (
        _along(
            "mixing_singular_value",
            "Singular values of each connection",
            "singular value of H_res",
            over="component",
            note="Depends on the stream basis.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "deflated_gain",
            "Stream collapse of the composite",
            "log₁₀ σ₁ of the product on 1⊥",
            thresholds=((-2.0, "collapsed: 1 % (log₁₀ 0.01)"),),
            note="Below −2 every stream carries the same signal.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "doubly_stochastic_violation",
            "Distance from doubly stochastic",
            "violation",
            over="kind",
            log_y=True,
            thresholds=((1e-2, "column limit: 0.01"),),
            note="Row error, column error and negativity of H_res, separately.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "composite_singular_value",
            "Singular values of the composite",
            "singular value of the product",
            over="component",
            log_y=True,
        ),
        _REDUCED,
    ),
    (
        _along(
            "mixing_entropy",
            "Mixing entropy of each connection",
            "row entropy",
            note="0 is a permutation, ln n is the uniform average.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "identity_distance",
            "Distance from the identity",
            "‖H_res − I‖ / √n",
            thresholds=((0.05, "stuck at identity: 0.05"),),
        ),
        _REDUCED,
    ),
    (
        _along("read_share", "What each sublayer reads", "share of the read weight", over="stream"),
        ("axis", "step"),
    ),
    (
        _along("write_share", "Where each sublayer writes", "share of the write weight", over="stream"),
        ("axis", "step"),
    ),
)

_MAPS = (
    (
        Matrix(
            "pair_gain",
            "Gain between every two connections",
            "Amax gain",
            "pair_gain",
            rows="other_connection",
            columns="connection",
            x_label="from connection",
            y_label="through connection",
            log_z=True,
            note="Largest over tokens; product of H_res from the one through the other.",
        ),
        ("direction", "axis", "step", "run"),
    ),
    (
        Matrix(
            "depth_kernel",
            "Which sublayer reads which",
            "mean |M|",
            "depth_kernel",
            rows="connection",
            columns="other_connection",
            x_label="source: output of connection",
            y_label="reader: input of connection",
            below=True,
            limits=(0.0, None),
            note="Does not depend on the stream basis; mean over tokens.",
        ),
        ("axis", "step", "run"),
    ),
)


def build_line(profile: Profile, analyses: Analyses, **selection: Any) -> Lines:
    """Figure of one mixing metric across connections.

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


def build_map(matrix: Matrix, analyses: Analyses, **selection: Any) -> Heatmap:
    """Heat map of every two connections of one run.

    Parameters
    ----------
    matrix : Matrix
        What to draw.
    analyses : mapping
        Run name → analysis.
    **selection : str or int
        Fields of `Selection`.

    Returns
    -------
    Heatmap
    """
    return build_matrix(matrix, analyses, Selection.of(selection))


_LINES = tuple(
    FigureKind(p.name, p.title, "mixing", (p.metric,), partial(build_line, p), uses) for p, uses in _PROFILES
)
_HEAT = tuple(
    FigureKind(m.name, m.title, "mixing", (m.metric,), partial(build_map, m), uses) for m, uses in _MAPS
)

KINDS = (*_LINES[:5], *_HEAT, *_LINES[5:])
