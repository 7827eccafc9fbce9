"""Which figures are there? One specification of each, drawn on the screen and on paper."""

from depthscope.app.figures.build.values import feeds
from depthscope.app.figures.catalogue import collapse, gradients, mixing, similarity
from depthscope.app.figures.specification import (
    CHOICES,
    Analyses,
    Figure,
    FigureKind,
    Heatmap,
    Line,
    Lines,
    Selection,
)

__all__ = [
    "CHOICES",
    "FIGURES",
    "Analyses",
    "Figure",
    "FigureKind",
    "Heatmap",
    "Line",
    "Lines",
    "Selection",
    "available",
]

FIGURES: dict[str, FigureKind] = {
    kind.name: kind for kind in (*collapse.KINDS, *similarity.KINDS, *mixing.KINDS, *gradients.KINDS)
}
"""Every figure by name, in display order."""


def available(analyses: Analyses) -> dict[str, FigureKind]:
    """Figures that at least one of the runs can feed.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.

    Returns
    -------
    dict
        Name → kind, in display order.
    """
    return {
        name: kind
        for name, kind in FIGURES.items()
        if any(feeds(data, kind.needs) for data in analyses.values())
    }
