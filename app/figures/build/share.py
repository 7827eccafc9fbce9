"""How large is a number as a share of what noise would give? Curves divided by their nulls, so that 1 means no structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from depthscope.app.figures.build.measurement import null_words
from depthscope.app.figures.build.spectrum_figure import NOISE_WORDS
from depthscope.app.figures.specification import NOISE_BASELINE, Array, Line, Lines, null_label

_WORDS = f"Divided by the {NOISE_BASELINE}: 1 is what independent noise of the same shape would give."


def share_of_null(figure: Lines) -> Lines:
    """A figure whose curves are divided by their nulls.

    ``figure``: measured curves, each followed by its null.
    Returns: The same figure where a measured curve has no null, or it is not clear which one it has: shares and values
    do not stand over one axis. Where the null is zero a share is undefined.
    """
    measured = [line for line in figure.lines if line.role == "measured"]
    nulls = {id(line): _null_of(line, figure.lines) for line in measured}
    if not measured or any(null is None for null in nulls.values()):
        return figure
    shares: list[Line] = []
    level: Array | None = None
    for line in figure.lines:
        level = nulls.get(id(line), level)
        if line.role == "measured" and level is not None and level.shape == line.y.shape:
            shares.append(_divided(line, level))
    ends = np.concatenate([line.x for line in shares]) if shares else np.zeros(0)
    span = np.array([ends.min(initial=0.0), ends.max(initial=0.0)])
    shares.append(Line(span, np.ones(2), NOISE_BASELINE, role="threshold"))
    return replace(
        figure,
        lines=tuple(shares),
        y_label=f"fraction of the {NOISE_BASELINE}",
        # Both are in units of the number itself.
        healthy=None,
        # Without the words about a dashed line that is not drawn.
        caption=" ".join(
            [_WORDS, *figure.caption.replace(null_words(figure.metric), "").replace(NOISE_WORDS, "").split()]
        ),
    )


def _null_of(line: Line, lines: Sequence[Line]) -> Array | None:
    """The null of a measured curve: that with its name, else the one that all curves of its run share."""
    of_run = [other for other in lines if other.role == "null" and other.group == line.group]
    named = [other for other in of_run if other.label == null_label(line.label)]
    found = named or (of_run if len(of_run) == 1 else [])
    # A density has other places than that of noise.
    return found[0].y if found and np.array_equal(found[0].x, line.x) else None


def _divided(line: Line, level: Array) -> Line:
    safe = np.where(level > 0, level, np.nan)

    def share(values: Array | None) -> Array | None:
        return None if values is None else values / safe

    return replace(
        line, y=line.y / safe, lower=share(line.lower), upper=share(line.upper), error=share(line.error)
    )
