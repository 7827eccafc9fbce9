"""Which names has a legend, and how many in a row? For many lines runs and variants separately, for many runs short ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from depthscope.app.drawing.matplotlib.fonts import points_across
from depthscope.app.drawing.matplotlib.style import Width, plain
from depthscope.app.figures.specification import Line
from depthscope.app.text.latex import Latex
from depthscope.app.text.visible import shortened

# A legend with more entries, or longer ones (in letters), would hide the curves: it goes below the axes. Heuristics of ours.
LEGEND_INSIDE = 4
LONGEST_INSIDE = 28
# Lines of several runs up to which each has an entry; of more, runs and variants are named separately.
MOST_ENTRIES = 8
# Runs whose names have room, and letters of the names of more.
FEW, SHORT_NAME = 4, 24


def fits_inside(entries: Sequence[str]) -> bool:
    """Whether a legend inside the axes hides little of the curves: few entries, and short ones."""
    return len(entries) <= LEGEND_INSIDE and max(map(len, entries), default=0) <= LONGEST_INSIDE


def named_apart(
    measured: Sequence[Line], looks: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[Any, str]]:
    """Entries of the runs in their colours, then of the variants in grey; nothing for few lines.

    ``looks``: by the ``id`` of each: the keywords that draw it.
    """
    runs: dict[str, Mapping[str, Any]] = {}
    variants: dict[str, Mapping[str, Any]] = {}
    for line in measured:
        runs.setdefault(line.group, looks[id(line)])
        variants.setdefault(variant_of(line), looks[id(line)])
    if len(measured) <= MOST_ENTRIES or len(runs) < 2:
        return
    for run, look_of_run in runs.items():
        yield Line2D([], [], **look_of_run), legend_name(run, len(runs))
    for variant, look_of_variant in variants.items():
        if variant:
            yield Line2D([], [], color="0.4", linestyle=look_of_variant["linestyle"]), plain(variant)


def variant_of(line: Line) -> str:
    """What distinguishes a line from others of its run.

    Returns: Empty for the plain line of a run.
    """
    return line.label.removeprefix(line.group).removeprefix(" · ")


def legend_name(run: str, count: int) -> str:
    """The name of a run in a legend: of many runs shorter, so that the legend is not higher than the axes."""
    # LaTeX of a PGF figure is not cut.
    return plain(run if isinstance(run, Latex) or count <= FEW else shortened(run, SHORT_NAME, counted=False))


def num_columns(entries: Sequence[str], size: Width) -> int:
    """Columns of a legend below the axes, so that the longest entry fits."""
    points = size.points - 1
    # The handle with its spaces is four and a half em wide. LaTeX of a PGF figure is not measured: half an em a letter.
    longest = max(
        (
            0.5 * points * len(entry) if isinstance(entry, Latex) else points_across(plain(entry), points)
            for entry in entries
        ),
        default=0.0,
    )
    return max(1, min(len(entries), int(72 * size.inches // (longest + 4.5 * points))))
