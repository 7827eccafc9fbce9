"""Which figures are there? One definition of each, drawn on the screen and on paper."""

from depthscope.app.figures import catalogue
from depthscope.app.figures.build.curve_figure import default_figures
from depthscope.app.figures.build.values import feeds
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
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

__all__ = [
    "CHOICES",
    "DEFINED",
    "DRAWN",
    "FIGURES",
    "NOT_DRAWN",
    "Analyses",
    "Figure",
    "FigureKind",
    "Heatmap",
    "Line",
    "Lines",
    "Selection",
    "available",
]

DEFINED: dict[str, FigureKind] = {
    kind.name: kind for kind in vars(catalogue).values() if isinstance(kind, FigureKind)
}
"""Every figure of the catalogue by name, in display order."""

# `also` too: a band is in the figure of its metric and needs none of its own.
DRAWN = frozenset(name for kind in DEFINED.values() for name in (*kind.needs, *kind.also))
"""Metrics that a figure of the catalogue draws."""

NOT_DRAWN = {"num_tokens": "every caption counts the tokens"}
"""Metrics that have no figure of their own, with the reason."""

FIGURES: dict[str, FigureKind] = DEFINED | {
    kind.name: kind
    for kind in default_figures(
        [metric for name, metric in CATALOGUE.items() if name not in DRAWN and name not in NOT_DRAWN],
        tuple(DEFINED.values()),
    )
}
"""Every figure by name, in display order: the defined ones, then one for every metric that none of them draws but could."""


def available(analyses: Analyses) -> dict[str, FigureKind]:
    """Figures that at least one of the runs can feed.

    Returns: Name → kind, in display order.
    """
    return {
        name: kind
        for name, kind in FIGURES.items()
        if any(feeds(data, kind.needs) for data in analyses.values())
    }
