"""What do the connections do to the streams? Gains, collapse of the streams, spectra, and who reads whom."""

from functools import partial
from typing import Any

from depthscope.app.figures.build.matrix import Matrix, build_matrix
from depthscope.app.figures.build.profile import Profile, build_profile
from depthscope.app.figures.specification import Analyses, FigureKind, Heatmap, Lines, Selection

__all__ = ["KINDS"]

_GAIN_LIMITS = ((1.0, "1"), (10.0, "warn: 10"), (100.0, "fail: 100"))
_GAIN_USES = ("direction", "reduction", "axis", "step")
_REDUCED = ("reduction", "axis", "step")


def _along(name: str, title: str, y_label: str, **more: Any) -> Profile:
    """Profile across connections of the variable of the same name."""
    return Profile(name, title, y_label, name, along="connection", **more)


_GAINS = (
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
            "mixing_attenuation",
            "Attenuation of each connection",
            "least sum of H_res",
            over="direction",
            log_y=True,
            thresholds=((0.5, "attenuated: 0.5"),),
            note="Smallest signed row sum (forward) or column sum (backward) of H_res.",
        ),
        _GAIN_USES,
    ),
    (
        _along(
            "composite_attenuation",
            "Attenuation of the composite",
            "least sum of the product",
            over="direction",
            log_y=True,
            thresholds=((0.5, "attenuated: 0.5"),),
            note="Smallest signed row sum (forward) or column sum (backward) of the product: the gain hides it.",
        ),
        _GAIN_USES,
    ),
    (
        _along(
            "composite_deviation",
            "Sums of the composite, away from 1",
            "largest |ln |sum||",
            thresholds=((0.7, "a factor of two: 0.7"),),
            note="Of the rows and columns of the product: up as the gain, down as the attenuation.",
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
            "operator_gain",
            "Operator norms of each connection",
            "norm of H_res",
            over="norm",
            log_y=True,
            thresholds=_GAIN_LIMITS,
            note="Without the cancellation that signed sums can hide.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "composite_operator_gain",
            "Operator norms of the composite",
            "norm of the product",
            over="norm",
            log_y=True,
            thresholds=_GAIN_LIMITS,
        ),
        _REDUCED,
    ),
)

_SPECTRA = (
    (
        _along(
            "mixing_singular_value",
            "Singular values of each connection",
            "singular value of H_res",
            over="component",
        ),
        _REDUCED,
    ),
    (
        _along(
            "mixing_eigenvalue_modulus",
            "Eigenvalues of each connection",
            "|eigenvalue| of H_res",
            over="component",
            component="|λ{}|",
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
        Profile(
            "lyapunov_spectrum",
            "Lyapunov exponents of the composite",
            "growth",
            "lyapunov_spectrum",
            along="component",
            thresholds=((0.0, "kept: 0"),),
            note="Of the whole product; below 0 a difference between streams dies with depth.",
        ),
        _REDUCED,
    ),
    (
        _along("condition_number", "Condition number of each connection", "σ₁ / σₙ", log_y=True),
        _REDUCED,
    ),
    (
        _along(
            "henrici",
            "Departure from normality of each connection",
            "√(‖H‖² − Σ|λ|²)",
            note="0 for a normal matrix; above it, powers can grow before they settle.",
        ),
        _REDUCED,
    ),
    (_along("numerical_radius", "Numerical radius of each connection", "r(H_res)"), _REDUCED),
)

_STREAMS = (
    (
        _along(
            "deflated_gain",
            "Stream collapse of the composite",
            "log₁₀ σ₁ of the product on 1⊥",
            thresholds=((-2.0, "collapsed: 1 % (log₁₀ 0.01)"),),
            reference=("replayed_deflated_gain", "initialisation and weight decay alone"),
            note="Below −2 every stream carries the same signal.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "suffix_deflated_gain",
            "Stream collapse on the way to the head",
            "log₁₀ σ₁ of the product on 1⊥",
            thresholds=((-2.0, "collapsed: 1 % (log₁₀ 0.01)"),),
            note="Product of H_res from this connection through the last: below −2 the head cannot tell to which stream a "
            "connection wrote.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "effective_streams",
            "Effective streams between earlier and later connections",
            "effective streams",
            thresholds=((1.5, "one dominant stream: 1.5"),),
            note="At the cut before each connection.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "spectral_gap",
            "Spectral gap of each connection",
            "1 − |λ₂|",
            note="0 keeps the streams apart, 1 makes them equal at once.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "dobrushin",
            "Dobrushin coefficient of each connection",
            "τ(H_res)",
            note="The most that a difference between streams may keep: 1 for the identity, 0 for uniform mixing.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "composite_dobrushin",
            "Dobrushin coefficient of the composite",
            "τ of the product",
            log_y=True,
            note="Product of H_res from the first connection through this one; it stops at rounding, near 1e-16.",
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
        _along(
            "initial_distance",
            "How far training moved each connection",
            "‖H_res − initial‖ / √n",
            note="From the matrix of the initial static logits.",
        ),
        _REDUCED,
    ),
    (
        _along(
            "replay_distance",
            "What weight decay alone does not explain",
            "‖H_res − replayed‖ / √n",
            note="Distance from what weight decay alone makes of the initial static logits.",
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
    (
        _along(
            "read_streams",
            "How many streams each sublayer reads",
            "streams",
            note="1 where one stream gives all it reads.",
        ),
        ("axis", "step"),
    ),
    (
        _along(
            "write_streams",
            "How many streams each sublayer writes to",
            "streams",
            note="1 where one stream takes all it writes.",
        ),
        ("axis", "step"),
    ),
)

_PATHS = (
    (
        _along(
            "effective_path_depth",
            "How far back each sublayer reads",
            "mean distance of what is read",
        ),
        ("axis", "step"),
    ),
    (
        _along(
            "read_mass",
            "How much of each sublayer's output is read",
            "Σ |M| over later readers",
            log_y=True,
            note="Near 0: a wasted layer.",
        ),
        ("axis", "step"),
    ),
)

_PAIR_GAIN = Matrix(
    "pair_gain",
    "Gain between every two connections",
    "Amax gain",
    "pair_gain",
    rows="other_connection",
    columns="connection",
    x_label="from connection",
    y_label="through connection",
    log_z=True,
    note="Product of H_res from the one through the other.",
)

_DEPTH_KERNEL = Matrix(
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


def _lines(profiles: tuple[tuple[Profile, tuple[str, ...]], ...], section: str) -> tuple[FigureKind, ...]:
    return tuple(
        FigureKind(p.name, p.title, "mixing", (p.metric,), partial(build_line, p), uses, section, p.also)
        for p, uses in profiles
    )


def _map(matrix: Matrix, uses: tuple[str, ...], section: str) -> FigureKind:
    return FigureKind(
        matrix.name, matrix.title, "mixing", (matrix.metric,), partial(build_map, matrix), uses, section
    )


KINDS = (
    *_lines(_GAINS, "Gains"),
    _map(_PAIR_GAIN, ("direction", "reduction", "axis", "step", "run"), "Gains"),
    *_lines(_STREAMS, "Streams"),
    *_lines(_SPECTRA, "Spectra"),
    _map(_DEPTH_KERNEL, ("axis", "step", "run"), "Paths"),
    *_lines(_PATHS, "Paths"),
)
