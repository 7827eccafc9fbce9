"""What does theory say beside the curves? Lines of the laws that apply, in words, and why the others are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from depthscope.app.figures.specification import Array, Line
from depthscope.app.text.bibliography import source_words

if TYPE_CHECKING:
    from depthscope.diagnostics.theory import Law, Overlay

__all__ = [
    "FLAT",
    "apart",
    "law_lines",
    "law_sources",
    "law_words",
    "laws_beside",
    "missing_laws",
    "null_words",
    "reach",
]


def laws_beside(curve: xr.DataArray, data: xr.Dataset, metric: str) -> list[Overlay]:
    """The laws of a metric beside one of its curves.

    Parameters
    ----------
    curve : DataArray
        Measured curve.
    data : Dataset
        Analysis of its run.
    metric : str
        Name of the variable.

    Returns
    -------
    list of Overlay
    """
    from depthscope.diagnostics.theory import beside  # here: the figures' own import stays light

    return beside(curve.rename(metric), data)


def law_lines(overlays: Iterable[Overlay], like: Line) -> list[Line]:
    """The lines of the laws that apply, at the places of the measured one.

    Parameters
    ----------
    overlays : iterable of Overlay
        The laws beside a curve.
    like : Line
        The measured line.

    Returns
    -------
    list of Line
    """
    return [
        Line(
            like.x,
            np.asarray(overlay.values, dtype=np.float64),
            f"{like.label} · {overlay.law.label}",
            role="theory",
            group=like.group,
            text=like.text,
            law=overlay.law.label,
        )
        for overlay in overlays
        if overlay.values is not None
    ]


def law_words(overlays: Iterable[tuple[str, Overlay]]) -> str:
    """Sentences of a caption: each law that is drawn, its source and where it holds.

    Parameters
    ----------
    overlays : iterable of (str, Overlay)
        Run and law.

    Returns
    -------
    str
    """
    drawn = {overlay.law.name: overlay.law for _, overlay in overlays if overlay.values is not None}
    return " ".join(
        f"Long dashes: {law.label} ({source_words(law.cite)}); it holds for {law.assumption}."
        for law in drawn.values()
    )


def law_sources(
    overlays: Iterable[tuple[str, Overlay]], lines: Iterable[Line], metric: str
) -> tuple[str, ...]:
    """Bibliography keys of the laws that are drawn, that of the null among them.

    Parameters
    ----------
    overlays : iterable of (str, Overlay)
        Run and law.
    lines : iterable of Line
        The lines of the figure.
    metric : str
        Name of the variable.

    Returns
    -------
    tuple of str
    """
    law = _null_law(metric) if any(line.role == "null" for line in lines) else None
    drawn = [overlay.law.cite for _, overlay in overlays if overlay.values is not None]
    return tuple(dict.fromkeys(drawn + ([law.cite] if law else [])))


def missing_laws(overlays: Sequence[tuple[str, Overlay]]) -> tuple[str, ...]:
    """Why a law is not drawn, once for all runs that share the reason.

    Parameters
    ----------
    overlays : sequence of (str, Overlay)
        Run and law.

    Returns
    -------
    tuple of str
        Such as "No curve «Gaussian product» for a: …".
    """
    runs: dict[tuple[str, str], dict[str, None]] = {}
    for run, overlay in overlays:
        if overlay.values is None:
            runs.setdefault((overlay.law.label, overlay.reason), {})[run] = None
    return tuple(
        f"No curve «{label}» for {', '.join(names)}: {reason}." for (label, reason), names in runs.items()
    )


def null_words(metric: str) -> str:
    """Sentence of a caption about the null of a metric, with the law that gives it.

    Parameters
    ----------
    metric : str
        Name of the variable.

    Returns
    -------
    str
    """
    from depthscope.diagnostics.metrics.catalogue import CATALOGUE

    entry = CATALOGUE.get(metric)
    told = (getattr(entry.null, "__doc__", "") or "") if entry is not None and callable(entry.null) else ""
    what = told.partition("\n")[0].partition("; NaN")[0].rstrip(".") or "independent noise of the same shape"
    what = what if what[1:2].isupper() else what[0].lower() + what[1:]
    given = f" by the {law.label}" if (law := _null_law(metric)) else ""
    return f"Dashed: the null, {what}{given}."


def _null_law(metric: str) -> Law | None:
    from depthscope.diagnostics.theory import null_law

    return null_law(metric)


FLAT = 1e-4
"""Values that differ by a smaller share than this are one value: their axis must not blow rounding up."""


def apart(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, moved apart where hardly anything lies between them.

    Parameters
    ----------
    low, high : float
        Lowest and highest value.

    Returns
    -------
    tuple of float

    Examples
    --------
    >>> apart(1.0, 2.0), apart(2.0, 2.0)
    ((1.0, 2.0), (1.9, 2.1))
    """
    size = max(abs(low), abs(high))
    if high - low >= FLAT * size:
        return low, high
    return low - 0.05 * size, high + 0.05 * size


def reach(measured: Array, theory: Array, log_y: bool) -> tuple[float, float]:
    """Ends of an axis: what was measured, and of the laws what lies at most a decade (half the span) beyond.

    Parameters
    ----------
    measured, theory : numpy.ndarray
        Values that the axis can show; at least one measured.
    log_y : bool
        Whether the axis is logarithmic.

    Returns
    -------
    tuple of float
        Lowest and highest.

    Examples
    --------
    >>> reach(np.array([1.0, 2.0]), np.array([1.0, 1e9]), True)
    (1.0, 20.0)
    """
    low, high = float(measured.min()), float(measured.max())
    room = 0.5 * (high - low)
    least, most = (low / 10, high * 10) if log_y else (low - room, high + room)
    return (
        max(float(theory.min(initial=low)), least),
        min(float(theory.max(initial=high)), most),
    )
