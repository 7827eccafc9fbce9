"""Which lines does theory add to a curve, and in which words? Laws that apply, and why the others are missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from depthscope.app.figures.specification import Line
from depthscope.app.text.bibliography import source_words

if TYPE_CHECKING:
    from depthscope.diagnostics.theory import Overlay


def law_lines(overlays: Iterable[Overlay], like: Line) -> list[Line]:
    """The lines of the laws that apply, at the positions of the measured one."""
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
    """Sentences of a caption: each law that is drawn, its source and its assumption."""
    # By name: several runs and directions draw the same law, which is explained once.
    drawn = {overlay.law.name: overlay.law for _, overlay in overlays if overlay.values is not None}
    return " ".join(
        f"Long dashes: {law.label} ({source_words(law.cite)}); it holds for {law.assumption}."
        for law in drawn.values()
    )


def missing_laws(overlays: Iterable[tuple[str, Overlay]]) -> tuple[str, ...]:
    """Why a law is not drawn, once for all runs that share the reason.

    Returns: Such as "No curve «Gaussian product» for a: …".
    """
    runs: dict[tuple[str, str], list[str]] = {}
    for run, overlay in overlays:
        # In the order in which the reasons first appear; a run with several curves is named once.
        if overlay.values is None:
            named = runs.setdefault((overlay.law.label, overlay.reason), [])
            if run not in named:
                named.append(run)
    return tuple(
        f"No curve «{label}» for {', '.join(names)}: {reason}." for (label, reason), names in runs.items()
    )


def null_words(metric: str) -> str:
    """Sentence of a caption about the null of a metric, with the law that gives it."""
    # Here: the theory imports scipy's integration.
    from depthscope.diagnostics.metrics.catalogue import CATALOGUE
    from depthscope.diagnostics.theory import null_law

    null = CATALOGUE[metric].null if metric in CATALOGUE else None
    # The docstring of a null is a noun phrase; after "; NaN" comes where it is undefined.
    docstring = (null.__doc__ or "") if callable(null) else ""
    what = docstring.partition("\n")[0].partition("; NaN")[0].rstrip(".")
    what = what or "independent noise of the same shape"
    # A phrase that begins with a formula or a name, such as "IQR", stays capital.
    what = what if what[1:2].isupper() else what[0].lower() + what[1:]
    law = null_law(metric)
    return f"Dashed: the baseline, {what}{f' by the {law.label}' if law else ''}."
