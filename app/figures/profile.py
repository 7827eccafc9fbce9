"""How does one number change across depth or connections? Runs overlaid, with null and band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from app.figures.laws import law_lines, law_sources, law_words, laws_beside, missing_laws, null_words
from app.figures.specification import Analyses, Array, Line, Lines, Selection
from app.figures.values import fed, names_of, pick, positions
from app.figures.words import counted, describe_lines, dims_of, label_of, left_out, reduction_of

if TYPE_CHECKING:
    from diagnostics.theory import Overlay

__all__ = ["PLACES", "Profile", "build_profile", "healthy_range"]

PLACES = {
    ("depth", "depth"): "depth (0 = embedding)",
    ("depth", "relative"): "relative depth (0 = embedding, 1 = last state)",
    ("connection", "depth"): "connection (0 = first sublayer)",
    ("connection", "relative"): "relative position (0 = first, 1 = last connection)",
    ("weight", "depth"): "module, in the order of the model",
    ("weight", "relative"): "relative position (0 = first, 1 = last module)",
}


@dataclass(frozen=True)
class Profile:
    """Declaration of a figure of one variable across depth or connections.

    Parameters
    ----------
    name, title, y_label : str
        Register key, title and vertical axis.
    metric : str
        Variable of the analysis.
    along : {"depth", "connection", "weight"}
        The horizontal axis.
    over : str
        Dimension whose every label is a line of its own: "direction", "stream", "component", "kind" or empty.
    log_y : bool
        Logarithmic vertical axis.
    thresholds : tuple of (float, str)
        Values drawn as dotted lines, with their labels.
    scope : str
        Tokens behind a number whose variable has no scopes: those of all "data" or of a "sequence".
    note : str
        Sentence that ends the caption.
    """

    name: str
    title: str
    y_label: str
    metric: str
    along: str = "depth"
    over: str = ""
    log_y: bool = False
    thresholds: tuple[tuple[float, str], ...] = ()
    scope: str = "data"
    note: str = ""


def build_profile(profile: Profile, analyses: Analyses, choice: Selection) -> Lines:
    """Curves of one variable, one set for each run.

    Parameters
    ----------
    profile : Profile
        What to draw.
    analyses : mapping
        Run name → analysis.
    choice : Selection
        Which version of the number.

    Returns
    -------
    Lines
    """
    lines: list[Line] = []
    laws: list[tuple[str, Overlay]] = []
    for label, fixed in _splits(profile, analyses, choice):
        for run, data, array in fed(analyses, profile.metric, choice, **fixed):
            for suffix, curve in _curves(profile, array, label):
                name = f"{run} · {suffix}" if suffix else run
                measured = _measured(profile, data, curve, choice, fixed, run=run, label=name)
                beside = laws_beside(curve, data, profile.metric)
                lines += [*measured, *law_lines(beside, measured[0])]
                laws += [(run, law) for law in beside]
    ordered = sorted(_without_repeats(lines), key=lambda line: list(analyses).index(line.group))
    return _assemble(profile, analyses, choice, ordered, laws)


def _splits(profile: Profile, analyses: Analyses, choice: Selection) -> list[tuple[str, dict[str, str]]]:
    """The labels that are lines of their own, as (suffix of the line's label, labels to fix)."""
    if profile.over == "direction" and choice.direction == "both":
        return [(d, {"direction": d}) for d in ("forward", "backward")]
    if profile.over == "kind":
        return [(kind, {"kind": kind}) for kind in ("row", "column", "negativity")]
    each = profile.over == "stream" or choice.stream == "each"
    if each and "stream" in dims_of(analyses, profile.metric):
        streams = {
            str(s) for data in analyses.values() if "stream" in data.coords for s in data["stream"].values
        }
        return [(f"stream {s}", {"stream": s}) for s in sorted(streams - {"mean"}, key=int)]
    return [(choice.direction if profile.over == "direction" else "", {})]


def _curves(profile: Profile, array: xr.DataArray, label: str) -> list[tuple[str, xr.DataArray]]:
    """One-dimensional curves of a slice: itself, or one for each entry of a leftover dimension."""
    if profile.over == "kind":
        return [(label, array.sel(kind=label))]
    if profile.over == "component":
        return [(f"σ{i + 1}", array.isel(component=i)) for i in range(array.sizes["component"])]
    return [(label, array)]


def _measured(
    profile: Profile,
    data: xr.Dataset,
    curve: xr.DataArray,
    choice: Selection,
    fixed: dict[str, str],
    *,
    run: str,
    label: str,
) -> list[Line]:
    """The measured line with its spread, followed by its null where the analysis has one."""
    x = positions(curve, profile.along, choice.axis)
    y = np.asarray(curve.values, dtype=np.float64)
    lower, upper = _spread(profile, data, curve, choice, fixed)
    text = names_of(curve, profile.along)
    lines = [Line(x=x, y=y, label=label, lower=lower, upper=upper, group=run, text=text)]
    null = pick(data, f"{profile.metric}_null", choice, **fixed)
    if null is not None and bool(null.notnull().any()):
        level = np.broadcast_to(np.asarray(null.values, dtype=np.float64), y.shape).copy()
        lines.append(Line(x=x, y=level, label=f"{run} · null", role="null", group=run))
    return lines


def _without_repeats(lines: Sequence[Line]) -> list[Line]:
    """Lines with every null once: four streams of one run share the same expectation."""
    kept: list[Line] = []
    for line in lines:
        twins = (other for other in kept if other.role == "null" and other.group == line.group)
        if line.role != "null" or not any(np.array_equal(line.y, o.y, equal_nan=True) for o in twins):
            kept.append(line)
    return kept


def _spread(
    profile: Profile, data: xr.Dataset, curve: xr.DataArray, choice: Selection, fixed: dict[str, str]
) -> tuple[Array | None, Array | None]:
    """Band around a curve: ± one standard error, or the 1st to 99th percentile over tokens."""
    error = pick(data, f"{profile.metric}_stderr", choice, **fixed)
    if error is not None and bool(error.notnull().any()):
        return curve.values - error.values, curve.values + error.values
    whole = data[profile.metric]
    if profile.over in ("component", "kind") or choice.reduction not in ("mean", "median"):
        return None, None
    if "reduction" not in whole.dims or not {"p1", "p99"} <= {str(r) for r in whole["reduction"].values}:
        return None, None
    low, high = (pick(data, profile.metric, choice, **{**fixed, "reduction": r}) for r in ("p1", "p99"))
    assert low is not None
    assert high is not None
    return low.values, high.values


def healthy_range(metric: str) -> tuple[float, float] | None:
    """Healthy band that the catalogue declares for a metric.

    Parameters
    ----------
    metric : str
        Name in the catalogue.

    Returns
    -------
    tuple of float or None
        Low and high, ±inf where open; None where nothing is declared.
    """
    from diagnostics.catalogue import CATALOGUE  # here: the figures' own import stays light

    entry = CATALOGUE.get(metric)
    healthy = getattr(entry, "healthy", None)
    if healthy is None:
        return None
    low, high = getattr(healthy, "low", None), getattr(healthy, "high", None)
    if low is None and high is None:
        return None
    return (-np.inf if low is None else float(low), np.inf if high is None else float(high))


def _assemble(
    profile: Profile,
    analyses: Analyses,
    choice: Selection,
    lines: Sequence[Line],
    laws: Sequence[tuple[str, Overlay]],
) -> Lines:
    """The figure around its lines: thresholds, healthy band, caption and alt text."""
    ends = [end for line in lines for end in (line.x.min(initial=0.0), line.x.max(initial=0.0))] or [0.0, 1.0]
    span = np.array([min(ends), max(ends)])
    limits = [Line(span, np.full(2, v), label, role="threshold") for v, label in profile.thresholds]
    return Lines(
        name=profile.name,
        title=profile.title,
        x_label=PLACES[profile.along, choice.axis],
        y_label=label_of(analyses, profile.metric, profile.y_label),
        lines=(*lines, *limits),
        log_y=profile.log_y,
        healthy=healthy_range(profile.metric),
        caption=_caption(profile, analyses, choice, lines, law_words(laws)),
        alt=describe_lines(tuple(lines), profile.title, profile.along),
        metric=profile.metric,
        sources=law_sources(laws, lines, profile.metric),
        missing=missing_laws(laws),
    )


def _caption(
    profile: Profile, analyses: Analyses, choice: Selection, lines: Sequence[Line], laws: str
) -> str:
    """Reduction, count, estimator, what the band and the dashes mean, and which runs are missing."""
    drawn = {line.group for line in lines}
    shown = {run: analyses[run] for run in analyses if run in drawn}
    dims = dims_of(shown, profile.metric)
    scope = choice.scope if "scope" in dims else profile.scope
    tokens = "" if profile.along == "weight" else counted(shown, choice, scope)
    parts = [reduction_of(dims, choice), tokens]
    head = "; ".join(part for part in parts if part)
    said = [f"{head[0].upper()}{head[1:]}." if head else ""]
    said.append(_band_words(profile, lines))
    if any(line.role == "null" for line in lines):
        said.append(null_words(profile.metric))
    said.append(laws)
    if healthy_range(profile.metric) is not None:
        said.append("Green: healthy.")
    said.extend([profile.note, left_out(analyses, drawn)])
    return " ".join(part for part in said if part)


def _band_words(profile: Profile, lines: Sequence[Line]) -> str:
    """What the band around the lines is."""
    if all(line.lower is None for line in lines):
        return ""
    if profile.along == "connection":
        return "Band: 1st to 99th percentile over tokens."
    return "Band: ± one standard error over sequences."
