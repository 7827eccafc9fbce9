"""How alike are the states of two depths? CKA and angles between every two, and from each to the next."""

from functools import partial
from typing import Any

import numpy as np

from app.figures.matrix import Matrix, build_matrix
from app.figures.profile import Profile, build_profile
from app.figures.specification import Analyses, Figure, FigureKind, Line, Lines, Selection
from app.figures.values import fed, names_of, pick, positions
from app.figures.words import describe_lines

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
        beside[run] = data.assign({profile.metric: stepped})
    return build_profile(profile, beside, choice)


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

_MAPS = (
    (
        _by_depth("cka", "CKA of every two depths", "linear CKA", "cka", limits=(0.0, 1.0)),
        ("estimator", "tokens", "axis", "step", "run"),
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
        ("tokens", "axis", "step", "run"),
    ),
)

_ADJACENT = (
    (
        Profile("adjacent_cka", "CKA with the depth before", "linear CKA with depth − 1", "adjacent_cka"),
        ("estimator", "tokens", "axis", "step"),
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
)

_STEP_ANGLE = Profile(
    "adjacent_angle",
    "Angle to the depth before",
    "arccos(cos) / π",
    "angular_distance",
    note="Mean over tokens; near 0: the block does nothing.",
)

KINDS = (
    *(
        FigureKind(m.name, m.title, "similarity", (m.metric,), partial(build_map, m), uses)
        for m, uses in _MAPS
    ),
    *(
        FigureKind(p.name, p.title, "similarity", (p.metric,), partial(build_line, p), uses)
        for p, uses in _ADJACENT
    ),
    FigureKind(
        _STEP_ANGLE.name,
        _STEP_ANGLE.title,
        "similarity",
        (_STEP_ANGLE.metric,),
        partial(build_step_angle, _STEP_ANGLE),
        ("tokens", "axis", "step"),
    ),
)
