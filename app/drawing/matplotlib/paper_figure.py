"""What does a figure keep when it leaves our hands? The settings it was made with, and no date."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from depthscope.app.drawing.matplotlib.style import Width, plain, points_across, settings_of
from depthscope.app.figures.specification import Line
from depthscope.app.text.latex import Latex
from depthscope.app.text.visible import shortened

# A date in the file would change its bytes on every export.
_UNDATED: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


class PaperFigure(Figure):
    """A figure that is drawn and saved with the settings it was made with.

    Matplotlib reads the kind of embedded fonts, the font of mathematics and others when a figure is saved: a figure that was
    made for a venue and saved later would have Type 3 fonts, which venues reject.

    ``size``: whose settings.
    ``figsize``: inches.
    ``layout``: engine of the layout.
    """

    def __init__(
        self,
        size: Width,
        figsize: tuple[float, float],
        layout: Literal["constrained", "compressed"] = "constrained",
    ) -> None:
        # As they are now: a figure for a page of HTML has some of its own.
        self._settings = {name: mpl.rcParams[name] for name in settings_of(size)}
        super().__init__(figsize=figsize, layout=layout)

    def draw(self, renderer: RendererBase) -> None:
        """Draw with the settings of the figure."""
        with mpl.rc_context(self._settings):
            super().draw(renderer)

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save with the settings of the figure: TrueType fonts and, unless ``metadata`` is given, no date."""
        ending = Path(fname).suffix.removeprefix(".") if isinstance(fname, str | PathLike) else ""
        ending = str(kwargs.get("format") or ending or mpl.rcParams["savefig.format"])
        if ending in _UNDATED:
            kwargs.setdefault("metadata", _UNDATED[ending])
        with mpl.rc_context(self._settings):
            super().savefig(fname, **kwargs)


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
