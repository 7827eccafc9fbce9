"""How does one number change across depth or connections? Runs overlaid, with null and band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import caption_of
from depthscope.app.figures.build.laws import law_lines, law_sources, law_words, laws_beside, missing_laws
from depthscope.app.figures.build.spread import spread_of
from depthscope.app.figures.build.values import fed, names_of, pick, positions
from depthscope.app.figures.build.words import describe_lines, dims_of, label_of
from depthscope.app.figures.specification import Analyses, Line, Lines, Selection

if TYPE_CHECKING:
    from depthscope.diagnostics.theory import Overlay

__all__ = ["PLACES", "Profile", "build_profile", "healthy_range"]

PLACES = {
    ("depth", "depth"): "depth (0 = embedding)",
    ("depth", "relative"): "relative depth (0 = embedding, 1 = last state)",
    ("connection", "depth"): "connection (0 = first sublayer)",
    ("connection", "relative"): "relative position (0 = first, 1 = last connection)",
    ("weight", "depth"): "module, in the order of the model",
    ("weight", "relative"): "relative position (0 = first, 1 = last module)",
    ("component", "depth"): "order (0 = largest)",
    ("component", "relative"): "relative order (0 = largest, 1 = least)",
}

_SPLITS = {
    "kind": {"row": "row", "column": "column", "negativity": "negativity"},
    "norm": {"infinity": "∞-norm", "one": "1-norm", "two": "2-norm"},
}
STREAMED = "every token, streamed"
_STREAMED_WORDS = "Streamed: from sums over every token that was seen, not over the sampled ones."


@dataclass(frozen=True)
class Profile:
    """Declaration of a figure of one variable across depth or connections.

    Parameters
    ----------
    name, title, y_label : str
        Register key, title and vertical axis.
    metric : str
        Variable of the analysis.
    along : {"depth", "connection", "weight", "component"}
        The horizontal axis.
    over : str
        Dimension whose every label is a line of its own: "direction", "stream", "component", "kind", "norm" or empty.
    component : str
        Label of one component, its number in place of the braces.
    log_y : bool
        Logarithmic vertical axis.
    thresholds : tuple of (float, str)
        Values drawn as dotted lines, with their labels.
    scope : str
        Tokens behind a number whose variable has no scopes: those of all "data" or of a "sequence".
    around : str
        Variable that holds the band: along ``quantile``, or as ± of the value.
    twin : str
        Variable that says the same of every token, from streamed sums.
    reference : tuple of str
        Variable along the same axis to compare with, and its label; empty where there is none.
    note : str
        Sentence that ends the caption.
    """

    name: str
    title: str
    y_label: str
    metric: str
    along: str = "depth"
    over: str = ""
    component: str = "σ{}"
    log_y: bool = False
    thresholds: tuple[tuple[float, str], ...] = ()
    scope: str = "data"
    around: str = ""
    twin: str = ""
    reference: tuple[str, str] | tuple[()] = ()
    note: str = ""

    @property
    def also(self) -> tuple[str, ...]:
        """Variables beside the metric that are drawn where there are some."""
        return tuple(name for name in (self.around, self.twin, *self.reference[:1]) if name)


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
    words: dict[str, None] = {}
    for label, fixed in _splits(profile, analyses, choice):
        for run, data, array in fed(analyses, profile.metric, choice, **fixed):
            for suffix, curve in _curves(profile, array, label, fixed):
                name = f"{run} · {suffix}" if suffix else run
                measured, said = _measured(profile, data, curve, choice, fixed, run=run, label=name)
                beside = laws_beside(curve, data, profile.metric)
                lines += [*measured, *law_lines(beside, measured[0])]
                laws += [(run, law) for law in beside]
                words |= dict.fromkeys(said)
    streamed = _streamed(profile, analyses, choice)
    lines += [*streamed, *_references(profile, analyses, choice)]
    words |= dict.fromkeys(_streamed_words(profile, analyses, streamed))
    ordered = sorted(_without_repeats(lines), key=lambda line: list(analyses).index(line.group))
    return _assemble(profile, analyses, choice, ordered, laws, tuple(words))


def _splits(profile: Profile, analyses: Analyses, choice: Selection) -> list[tuple[str, dict[str, str]]]:
    """The labels that are lines of their own, as (suffix of the line's label, labels to fix)."""
    if profile.over == "direction" and choice.direction == "both":
        return [(d, {"direction": d}) for d in ("forward", "backward")]
    if profile.over in _SPLITS:
        return [(said, {profile.over: label}) for label, said in _SPLITS[profile.over].items()]
    each = profile.over == "stream" or choice.stream == "each"
    if each and "stream" in dims_of(analyses, profile.metric):
        streams = {
            str(s) for data in analyses.values() if "stream" in data.coords for s in data["stream"].values
        }
        return [(f"stream {s}", {"stream": s}) for s in sorted(streams - {"mean"}, key=int)]
    return [(choice.direction if profile.over == "direction" else "", {})]


def _curves(
    profile: Profile, array: xr.DataArray, label: str, fixed: dict[str, str]
) -> list[tuple[str, xr.DataArray]]:
    """One-dimensional curves of a slice: itself, or one for each entry of a leftover dimension."""
    if profile.over in _SPLITS:
        return [(label, array.sel(fixed))]
    if profile.over == "component":
        count = array.sizes["component"]
        return [(profile.component.format(i + 1), array.isel(component=i)) for i in range(count)]
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
) -> tuple[list[Line], tuple[str, ...]]:
    """The measured line with its spread, its null behind it where the analysis has one; and what the spread is."""
    x = positions(curve, profile.along, choice.axis)
    y = np.asarray(curve.values, dtype=np.float64)
    spread = spread_of(data, curve.rename(profile.metric), choice, profile.around, fixed)
    text = names_of(curve, profile.along)
    lines = [
        Line(x, y, label, lower=spread.lower, upper=spread.upper, error=spread.error, group=run, text=text)
    ]
    null = pick(data, f"{profile.metric}_null", choice, **fixed)
    return [*lines, *_null_line(null, lines[0])], spread.words


def _null_line(null: xr.DataArray | None, like: Line) -> list[Line]:
    """The null at the places of a measured line, where it is defined."""
    if null is None or not bool(null.notnull().any()):
        return []
    level = np.broadcast_to(np.asarray(null.values, dtype=np.float64), like.y.shape).copy()
    return [Line(like.x, level, f"{like.label} · null", role="null", group=like.group)]


def _streamed(profile: Profile, analyses: Analyses, choice: Selection) -> list[Line]:
    """What streamed sums of every token say, where the selection is of all tokens pooled."""
    if not profile.twin or choice.tokens != "all" or _within(profile, analyses, choice):
        return []
    lines = []
    for run, data, array in fed(analyses, profile.twin, choice):
        if "stream" not in data[profile.twin].dims and choice.stream != "mean":
            continue
        x, text = positions(array, "depth", choice.axis), names_of(array, "depth")
        error = pick(data, f"{profile.twin}_stderr", choice)
        y = np.asarray(array.values, dtype=np.float64)
        lower, upper = (None, None) if error is None else (y - error.values, y + error.values)
        line = Line(x, y, f"{run} · {STREAMED}", lower=lower, upper=upper, group=run, text=text)
        lines += [line, *_null_line(pick(data, f"{profile.twin}_null", choice), line)]
    return lines


def _streamed_words(profile: Profile, analyses: Analyses, lines: Sequence[Line]) -> list[str]:
    """What the streamed lines are of, and where the sums do not tell."""
    if not lines:
        return []
    drawn = {line.group for line in lines}
    reasons = (analyses[run][profile.twin].attrs.get("undefined_because") for run in analyses if run in drawn)
    return [_STREAMED_WORDS, *(f"A gap in it: {reason}." for reason in reasons if reason)]


def _references(profile: Profile, analyses: Analyses, choice: Selection) -> list[Line]:
    """The curve that the measured one is compared with, of every run that holds it."""
    if not profile.reference:
        return []
    name, label = profile.reference
    return [
        Line(
            positions(array, profile.along, choice.axis),
            array.values.astype(float),
            f"{run} · {label}",
            group=run,
        )
        for run, _, array in fed(analyses, name, choice)
    ]


def _within(profile: Profile, analyses: Analyses, choice: Selection) -> bool:
    """Whether the number is taken within each sequence, which streamed sums cannot tell."""
    return "scope" in dims_of(analyses, profile.metric) and choice.scope == "sequence"


def _without_repeats(lines: Sequence[Line]) -> list[Line]:
    """Lines with every null once: four streams of one run share the same expectation."""
    kept: list[Line] = []
    for line in lines:
        twins = (other for other in kept if other.role == "null" and other.group == line.group)
        if line.role != "null" or not any(np.array_equal(line.y, o.y, equal_nan=True) for o in twins):
            kept.append(line)
    return kept


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
    from depthscope.diagnostics.metrics.catalogue import (
        CATALOGUE,  # here: the figures' own import stays light
    )

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
    words: tuple[str, ...],
) -> Lines:
    """The figure around its lines: thresholds, healthy band, caption and alt text."""
    ends = [end for line in lines for end in (line.x.min(initial=0.0), line.x.max(initial=0.0))] or [0.0, 1.0]
    span = np.array([min(ends), max(ends)])
    limits = [Line(span, np.full(2, v), label, role="threshold") for v, label in profile.thresholds]
    scope = "" if profile.along == "weight" else profile.scope
    said = (
        *words,
        law_words(laws),
        "" if healthy_range(profile.metric) is None else "Green: healthy.",
        profile.note,
    )
    return Lines(
        name=profile.name,
        title=profile.title,
        x_label=PLACES[profile.along, choice.axis],
        y_label=label_of(analyses, profile.metric, profile.y_label),
        lines=(*lines, *limits),
        log_y=profile.log_y,
        healthy=healthy_range(profile.metric),
        caption=caption_of(profile.metric, analyses, choice, lines, scope=scope, said=said),
        alt=describe_lines(tuple(lines), profile.title, profile.along),
        metric=profile.metric,
        sources=law_sources(laws, lines, profile.metric),
        missing=missing_laws(laws),
    )
