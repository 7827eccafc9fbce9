"""How alike are the states of two depths? CKA and angles between every two, and from each to the next."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.figures.build.matrix import Matrix, build_matrix
from depthscope.app.figures.build.profile import Profile, build_profile
from depthscope.app.figures.build.values import fed, names_of, pick, positions
from depthscope.app.figures.build.words import describe_lines
from depthscope.app.figures.specification import Analyses, Figure, FigureKind, Line, Lines, Selection

__all__ = ["KINDS", "build_cut"]


def build_map(matrix: Matrix, analyses: Analyses, **selection: Any) -> Figure:
    """Heat map of every two depths of one run.

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


def build_line(profile: Profile, analyses: Analyses, **selection: Any) -> Lines:
    """Figure of each depth against the one before it.

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


def build_step_angle(profile: Profile, analyses: Analyses, **selection: Any) -> Lines:
    """Angle between each state and the one before it: the first subdiagonal of the angular distances.

    Parameters
    ----------
    profile : Profile
        What to draw; its metric is the full matrix.
    analyses : mapping
        Run name → analysis.
    **selection : str or int
        Fields of `Selection`.

    Returns
    -------
    Lines
    """
    choice = Selection.of(selection)
    beside = {}
    for run, data in analyses.items():
        matrix = pick(data, profile.metric, choice)
        if matrix is None:
            continue
        shifted = matrix.values.diagonal(offset=-1)
        line = matrix.isel(other_depth=0, drop=True).copy()
        line.values[0] = float("nan")
        line.values[1:] = shifted
        stepped = line.expand_dims("step") if "step" in line.coords else line
        beside[run] = data.drop_vars(f"{profile.metric}_stderr", errors="ignore").assign(
            {profile.metric: stepped}
        )
    return build_profile(profile, beside, choice)


def build_adjacent_cka(profile: Profile, analyses: Analyses, **selection: Any) -> Lines:
    """CKA of each depth with the one before, sampled and, of every token, streamed.

    Parameters
    ----------
    profile : Profile
        What to draw; its twin is cut from the streamed matrix.
    analyses : mapping
        Run name → analysis.
    **selection : str or int
        Fields of `Selection`.

    Returns
    -------
    Lines
    """
    choice = Selection.of(selection)
    beside = {run: _with_adjacent_twin(data, profile.twin) for run, data in analyses.items()}
    shown = profile if choice.estimator == "unbiased" else replace(profile, twin="")
    return build_profile(shown, beside, choice)


def _with_adjacent_twin(data: xr.Dataset, name: str) -> xr.Dataset:
    """The analysis with the subdiagonal of the streamed CKA and of its error under the name of the twin."""
    found = {}
    for variable, twin in (("streamed_cka", name), ("streamed_cka_error", f"{name}_stderr")):
        if variable in data:
            matrix = data[variable].transpose(..., "depth", "other_depth")
            line = matrix.isel(other_depth=0, drop=True).astype(float).copy()
            line.values[...] = np.nan
            line.values[..., 1:] = np.diagonal(matrix.values, offset=-1, axis1=-2, axis2=-1)
            found[twin] = line
    return data.assign(found)


def build_cut(analyses: Analyses, *, depths: tuple[int, int], **selection: Any) -> Lines:
    """CKA of two depths of one run with every depth of it: two rows of the heat map.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    depths : tuple of int
        The two depths.
    **selection : str or int
        Fields of `Selection`; `run` names the run, else the first one.

    Returns
    -------
    Lines
    """
    choice = Selection.of(selection)
    run, _, matrix = next(
        (name, data, array)
        for name, data, array in fed(analyses, "cka", choice)
        if choice.run is None or name == choice.run
    )
    text = names_of(matrix, "other_depth")
    x = positions(matrix, "other_depth")
    lines = tuple(
        Line(
            x,
            np.asarray(matrix.isel(depth=depth).values, dtype=np.float64),
            f"depth {depth} ({text[depth]})",
            group=run,
            text=text,
        )
        for depth in dict.fromkeys(depths)
    )
    title = "CKA of the two depths with every depth"
    return Lines(
        name="cka_cut",
        title=title,
        x_label="depth (0 = embedding)",
        y_label="linear CKA",
        lines=lines,
        caption=f"Run {run}; rows {depths[0]} and {depths[1]} of the heat map.",
        alt=describe_lines(lines, title, "depth"),
        metric="cka",
    )


_by_depth = partial(Matrix, rows="depth", columns="other_depth", x_label="depth", y_label="depth")
_BOUNDED = (0.0, 1.0)
_USES = ("tokens", "axis", "step", "run")

_MAPS = (
    (
        _by_depth("cka", "CKA of every two depths", "linear CKA", "cka", limits=_BOUNDED),
        ("estimator", *_USES),
    ),
    (
        _by_depth(
            "angular_distance",
            "Angle between every two depths",
            "arccos(cos) / π",
            "angular_distance",
            limits=(0.0, None),
            note="Mean over tokens.",
        ),
        _USES,
    ),
    (
        _by_depth(
            "streamed_cka",
            "CKA of every two depths, every token",
            "linear CKA",
            "streamed_cka",
            limits=_BOUNDED,
            error="streamed_cka_error",
            counts=False,
            note="From streamed sums over every token seen.",
        ),
        ("axis", "step", "run"),
    ),
    *(
        (_by_depth(name, f"{title} of every two depths", z_label, name, limits=limits), _USES)
        for name, title, z_label, limits in (
            ("rbf_cka", "RBF CKA", "RBF CKA", _BOUNDED),
            ("svcca", "SVCCA", "mean canonical correlation", _BOUNDED),
            ("pwcca", "PWCCA", "weighted canonical correlation", _BOUNDED),
            ("procrustes", "Procrustes distance", "Procrustes distance", (0.0, None)),
            ("rsa", "RSA", "correlation of distances", (None, 1.0)),
            ("mutual_knn", "Mutual nearest neighbours", "share of neighbours", _BOUNDED),
            ("cknna", "CKNNA", "CKNNA", (None, 1.0)),
        )
    ),
)

_ADJACENT_CKA = Profile(
    "adjacent_cka",
    "CKA with the depth before",
    "linear CKA with depth − 1",
    "adjacent_cka",
    twin="streamed_adjacent_cka",
)

_ADJACENT = (
    (
        Profile(
            "adjacent_cosine",
            "Cosine with the depth before",
            "cos(x at depth − 1, x)",
            "adjacent_cosine",
            around="adjacent_cosine_band",
            note="The residual stream turns where it is low.",
        ),
        ("stream", "axis", "step"),
    ),
    (
        Profile(
            "block_influence",
            "Block influence across depth",
            "1 − cos(in, out)",
            "block_influence",
            note="Near 0: the block hardly changes the state.",
        ),
        ("tokens", "axis", "step"),
    ),
    (
        Profile(
            "stream_cosine",
            "Cosine between streams across depth",
            "mean cosine of two streams",
            "stream_cosine",
            thresholds=((0.99, "copied streams: 0.99"),),
        ),
        ("axis", "step"),
    ),
    (
        Profile(
            "stream_cka",
            "CKA between streams across depth",
            "mean linear CKA of two streams",
            "stream_cka",
        ),
        ("estimator", "axis", "step"),
    ),
)

_STEP_ANGLE = Profile(
    "adjacent_angle",
    "Angle to the depth before",
    "arccos(cos) / π",
    "angular_distance",
    note="Mean over tokens; near 0: the block does nothing.",
)


def _line_kind(
    profile: Profile, build: Callable[..., Lines], uses: tuple[str, ...], also: tuple[str, ...] = ()
) -> FigureKind:
    return FigureKind(
        profile.name,
        profile.title,
        "similarity",
        (profile.metric,),
        partial(build, profile),
        uses,
        also=also or profile.also,
    )


KINDS = (
    *(
        FigureKind(m.name, m.title, "similarity", (m.metric,), partial(build_map, m), uses, also=m.also)
        for m, uses in _MAPS
    ),
    _line_kind(
        _ADJACENT_CKA,
        build_adjacent_cka,
        ("estimator", "tokens", "axis", "step"),
        ("streamed_cka", "streamed_cka_error"),
    ),
    *(_line_kind(profile, build_line, uses) for profile, uses in _ADJACENT),
    _line_kind(_STEP_ANGLE, build_step_angle, ("tokens", "axis", "step")),
)
