"""How are panels drawn on paper? One alone, or several side by side with letters, under one legend, each run in one colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from depthscope.app.drawing.matplotlib.curves import (
    DASHES,
    DENSE,
    HEALTHY,
    MARK,
    NULL,
    add_bar,
    keywords_of,
    measured_of,
    plot_heatmap,
    plot_lines,
)
from depthscope.app.drawing.matplotlib.style import (
    PaperFigure,
    Width,
    inches_of,
    label_axes,
    num_columns,
    plain,
    wrapped,
)
from depthscope.app.figures.composed import Composed, LetteredPanel, letter
from depthscope.app.figures.palette import Look, look_of
from depthscope.app.figures.specification import NOISE_BASELINE, Figure, Heatmap, Lines, looks_of
from depthscope.app.text.visible import shortened

# A panel needs this much for its ticks, label and colour bar. Inches, a heuristic of ours.
LEAST_ACROSS = 1.6
MOST_COLUMNS = 4
# Of a figure: with its caption it has to fit a page nine inches high.
HIGHEST = 6.6
# Lines up to which each has an entry of a figure that is alone; of more, runs and variants are named separately.
MOST_ENTRIES = 8
# Runs whose names have room in a legend, and letters of the names of more.
FEW, SHORT_NAME = 4, 24


def draw(figure: Composed | Figure, size: Width, *, dense: int = DENSE) -> PaperFigure:
    """Draw a figure, or panels side by side, with one legend below all of it.

    ``figure``: what to draw; at least one panel.
    ``size``: inches across and type size; `figure_style` must be active.
    ``dense``: cells from which a map is rasterised.
    Returns: Each of the axes has its panel's key as its label, see `Axes.get_label`.
    """
    if not isinstance(figure, Composed):
        runs = figure.runs if isinstance(figure, Lines) else {}
        figure = Composed(figure.name, figure.title, (LetteredPanel(figure.name, "", figure),), runs)
    columns = _columns(figure.panels, size)
    rows = math.ceil(len(figure.panels) / columns)
    across = size.inches / columns
    entries = list(_entries(figure))
    per_row = num_columns([label for _, label in entries], size)
    lines = math.ceil(len(entries) / per_row) if len(entries) > 1 else 0
    below = lines * 1.45 * size.points / 72 + (0.08 if _is_lettered(figure) else 0.0)
    row = min(_height(figure, across), (HIGHEST - below) / rows)
    is_map = not _is_lettered(figure) and isinstance(figure.panels[0].content, Heatmap)
    layout: Any = "compressed" if is_map else "constrained"  # which leaves squares no gaps
    canvas = PaperFigure(size, (size.inches, rows * row + below), layout)
    axes: dict[str, Axes] = {}
    for place, panel in enumerate(figure.panels):
        axes[panel.key] = canvas.add_subplot(rows, columns, place + 1, label=panel.key)
    room = (0.74 * across, 0.72 * row) if _is_lettered(figure) else (0.8 * across, 0.7 * row)
    _draw_panels(figure, axes, room, dense)
    if lines:
        handles, names = zip(*entries, strict=True)
        canvas.legend(handles, names, loc="outside lower center", ncols=per_row)
    return canvas


def draw_into(figure: Composed, axes: Mapping[str, Axes]) -> None:
    """Draw panels into somebody's axes, lettered in their order, each with a legend where it has several lines.

    ``axes``: by the keys of the panels; a panel without axes is not drawn, and the letters of the others follow on.
    """
    _draw_panels(figure, axes)
    for ax in axes.values():
        if len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend()


def _is_lettered(figure: Composed) -> bool:
    """Whether it is of several panels, or of one that has a title of its own."""
    return any(panel.title for panel in figure.panels)


def _draw_panels(
    figure: Composed, axes: Mapping[str, Axes], room: tuple[float, float] | None = None, dense: int = DENSE
) -> None:
    """Draw panels with their titles and labels, wrapped to some inches across and up, by default those of their axes."""
    for place, panel in enumerate(panel for panel in figure.panels if panel.key in axes):
        ax, content = axes[panel.key], panel.content
        across, up = room or inches_of(ax)
        if isinstance(content, Heatmap):
            mesh = plot_heatmap(ax, content, dense=dense)
            if not content.printed:
                if _is_lettered(figure):
                    ax.set_aspect("auto")
                add_bar(ax, mesh, wrapped(content.z_label, up))
        else:
            plot_lines(ax, content, _looks(figure, content))
        x_label = content.x_label.partition(" (")[0] if _is_lettered(figure) else content.x_label
        label_axes(ax, x_label, content.y_label, (across, up))
        if panel.title:
            points = mpl.rcParams["legend.fontsize"]
            points = points if isinstance(points, int | float) else mpl.rcParams["font.size"]
            title = wrapped(f"({letter(place)}) {panel.title}", across, points)
            ax.set_title(title, loc="left", fontsize=points)


def _columns(panels: Sequence[LetteredPanel], size: Width) -> int:
    """Columns in which panels are wide enough."""
    most = max(1, min(MOST_COLUMNS, int(size.inches // LEAST_ACROSS)))
    if len(panels) <= most:
        return len(panels)
    if all(map(_is_printed, panels)):
        return 3  # three single ones, and three products below them
    if len(panels) == 4 and most == 3:
        return 2
    # Of four and three columns those that leave the smaller gap in the last row.
    return min((4, 3), key=lambda columns: -len(panels) % columns) if most == 4 else most


def _height(figure: Composed, across: float) -> float:
    """Inches of a row."""
    if not _is_lettered(figure):
        if isinstance(figure.panels[0].content, Heatmap):
            return 0.82 * min(across, 4.2)  # a square across the page would be as high as the page
        # Near the golden ratio in one column; flatter across the page, where it would take half of it.
        return (0.62 if across < 4 else 0.45) * across
    if all(map(_is_printed, figure.panels)):
        return min(0.95 * across, 1.65)  # four rows of them are a page
    return min(0.82 * across, 2.6)  # one or two panels would be as high as half a page


def _is_printed(panel: LetteredPanel) -> bool:
    return isinstance(panel.content, Heatmap) and panel.content.printed


# --- colours and dashes that hold for all panels


def _variants(figure: Composed) -> list[str]:
    """Distinct variants of all panels, in the order of their dashes; the plain line first."""
    lines = measured_of([panel.content for panel in figure.panels])
    return list(dict.fromkeys(["", *(line.variant for line in lines)]))


def _looks(figure: Composed, content: Lines) -> dict[int, Look]:
    if not _is_lettered(figure):
        return looks_of(content)
    variants = _variants(figure)
    return {
        id(line): look_of(figure.runs[line.group], variants.index(line.variant))
        for line in measured_of([content])
    }


def _entries(figure: Composed) -> Iterator[tuple[Any, str]]:
    """Handles and labels of the legend: lines, or runs and in grey their variants, then nulls and limits."""
    contents = [panel.content for panel in figure.panels]
    curves = [content for content in contents if isinstance(content, Lines)]
    measured = measured_of(contents)
    several = len({line.group for line in measured}) > 1
    if not _is_lettered(figure) and measured and (len(measured) <= MOST_ENTRIES or not several):
        looks = looks_of(curves[0])
        for line in measured:
            yield Line2D([], [], **keywords_of(looks[id(line)])), plain(line.label)
    else:
        yield from _runs_and_variants(figure, [line.group for line in measured])
    roles = {line.role for content in curves for line in content.lines}
    # What has the colour of its run, once in grey for all runs.
    if "null" in roles:
        yield Line2D([], [], color="0.4", **NULL), NOISE_BASELINE
    if "mark" in roles:
        yield Line2D([], [], color="0.8", **MARK), "a verdict warns or fails"
    if any(content.healthy is not None for content in curves):
        yield Patch(color=HEALTHY, linewidth=0), "healthy"


def _runs_and_variants(figure: Composed, groups: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """An entry of each run that is drawn, and in grey of what distinguishes lines of a run."""
    drawn = dict.fromkeys(groups)
    known = {run: number for run, number in figure.runs.items() if run in drawn}
    others = {run: place for place, run in enumerate(drawn) if run not in known}
    for run, number in (known | others).items():
        name = run if len(drawn) <= FEW else shortened(run, SHORT_NAME, counted=False)
        yield Line2D([], [], **keywords_of(look_of(number))), plain(name)
    for place, variant in enumerate(_variants(figure)):
        if variant:
            yield Line2D([], [], color="0.4", linestyle=DASHES[place % len(DASHES)]), plain(variant)
