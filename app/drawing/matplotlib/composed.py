"""How are several panels drawn on paper? Side by side with letters, under one legend, each run in one colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch

from depthscope.app.drawing.matplotlib.curves import (
    DASHES,
    HEALTHY,
    MARK,
    NULL,
    keywords_of,
    plot_lines,
)
from depthscope.app.drawing.matplotlib.matrices import add_bar, plot_heatmap
from depthscope.app.drawing.matplotlib.paper_figure import PaperFigure, legend_name, num_columns, variant_of
from depthscope.app.drawing.matplotlib.style import (
    Label,
    Width,
    fit_labels,
    inches_of,
    label_axes,
    plain,
    wrapped,
)
from depthscope.app.figures.composed import Composed, LetteredPanel, Points, letter
from depthscope.app.figures.palette import look_of
from depthscope.app.figures.specification import NOISE_BASELINE, Heatmap, Line, Lines

# A panel needs this much for its ticks, label and colour bar. Inches, a heuristic of ours.
LEAST_ACROSS = 1.6
MOST_COLUMNS = 4
# Of a figure: with its caption it has to fit a page nine inches high.
HIGHEST = 6.6
DIFFERS = "groups differ (p < 0.05)"


def draw_composed(figure: Composed, size: Width) -> PaperFigure:
    """Draw the panels side by side, with one legend below all of them.

    ``figure``: what to draw; at least one panel.
    ``size``: inches across and type size; `figure_style` must be active.
    Returns: Each of its panels' axes has the panel's key as its label, see `Axes.get_label`.
    """
    columns = _columns(figure.panels, size)
    rows = math.ceil(len(figure.panels) / columns)
    across = size.inches / columns
    entries = list(_entries(figure))
    per_row = num_columns([label for _, label in entries], size)
    lines = math.ceil(len(entries) / per_row) if len(entries) > 1 else 0
    below = lines * 1.45 * size.points / 72 + 0.08
    row = min(_height(figure.panels, across), (HIGHEST - below) / rows)
    canvas = PaperFigure(size, (size.inches, rows * row + below))
    axes: dict[str, Axes] = {}
    for place, panel in enumerate(figure.panels):
        axes[panel.key] = canvas.add_subplot(rows, columns, place + 1, label=panel.key)
    labels = _draw_panels(figure, axes, 0.76 * across)
    if lines:
        handles, names = zip(*entries, *_unnamed_thresholds(figure, axes.values()), strict=True)
        canvas.legend(handles, names, loc="outside lower center", ncols=per_row, frameon=False)
    fit_labels(canvas, labels)
    return canvas


def draw_into(figure: Composed, axes: Mapping[str, Axes]) -> None:
    """Draw panels into somebody's axes, lettered in their order, with a legend below all that their figure contains.

    ``figure``: what to draw.
    ``axes``: by the keys of the panels; a panel without axes is not drawn, and the letters of the others follow on.
    """
    _draw_panels(figure, axes)
    entries = [*_entries(figure), *_unnamed_thresholds(figure, axes.values())]
    if axes and len(entries) > 1:
        canvas = next(iter(axes.values())).get_figure(root=True)
        assert canvas is not None
        _add_legend(canvas, entries)


def _draw_panels(figure: Composed, axes: Mapping[str, Axes], inches: float = 0.0) -> list[Label]:
    """Draw panels with their titles, wrapped to so many inches, by default those of their axes."""
    labels = []
    for place, panel in enumerate(panel for panel in figure.panels if panel.key in axes):
        ax = axes[panel.key]
        room = inches or inches_of(ax)[0]
        labels += _draw_panel(figure, panel, ax, 0.72 * room)
        points = mpl.rcParams["legend.fontsize"]
        points = points if isinstance(points, int | float) else mpl.rcParams["font.size"]
        title = f"({letter(place)}) {panel.title}"
        artist = ax.set_title(wrapped(title, room, points), loc="left", fontsize=points)
        labels.append(Label(ax, artist, title))
    return labels


OUR_LEGEND = "depthscope-legend"


def _add_legend(canvas: Figure, entries: Sequence[tuple[Any, str]]) -> None:
    """A legend below somebody's figure: a second call adds its entries to those of the first."""
    for before in [legend for legend in canvas.legends if legend.get_gid() == OUR_LEGEND]:
        labels = [text.get_text() for text in before.get_texts()]
        known = list(zip(before.legend_handles, labels, strict=True))
        entries = [
            *known,
            *(entry for entry in entries if _mark_of(*entry) not in {_mark_of(*e) for e in known}),
        ]
        before.remove()
    handles, labels = map(list, zip(*entries, strict=True))
    # Below the figure, which `bbox_inches="tight"` keeps: inside it would lie over somebody's axes.
    legend = canvas.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)
    legend.set_gid(OUR_LEGEND)


def _mark_of(handle: Any, label: str) -> tuple[str, str]:
    """What distinguishes entries of a legend: runs of two calls may share a name and not a colour."""
    return label, to_hex(handle.get_color() if isinstance(handle, Line2D) else handle.get_facecolor())


def _draw_panel(figure: Composed, panel: LetteredPanel, axes: Axes, height: float) -> list[Label]:
    content = panel.content
    labels = []
    if isinstance(content, Heatmap):
        mesh = plot_heatmap(axes, content)
        if not content.printed:
            axes.set_aspect("auto")
            labels.append(add_bar(axes, mesh, content.z_label))
    elif isinstance(content, Points):
        _plot_points(axes, content, figure)
    else:
        plot_lines(axes, content, _looks(figure, content))
        _mark_differences(axes, panel)
    across = content.x_label.partition(" (")[0]
    return [*labels, *label_axes(axes, across, content.y_label, (2 * height, height))]


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


def _height(panels: Sequence[LetteredPanel], across: float) -> float:
    """Inches of a row."""
    if all(map(_is_printed, panels)):
        return min(0.95 * across, 1.65)  # four rows of them are a page
    square = any(isinstance(panel.content, Points) for panel in panels)
    # One or two panels would be as high as half a page.
    return min((0.98 if square else 0.82) * across, 2.6)


def _is_printed(panel: LetteredPanel) -> bool:
    return isinstance(panel.content, Heatmap) and panel.content.printed


# --- colours and dashes that hold for all panels


def _variants(figure: Composed) -> list[str]:
    """Distinct variants of all panels, in the order of their dashes; the plain line first."""
    found = dict.fromkeys([""])
    for panel in figure.panels:
        if isinstance(panel.content, Lines):
            found |= dict.fromkeys(
                variant_of(line) for line in panel.content.lines if line.role == "measured"
            )
    return list(found)


def _looks(figure: Composed, content: Lines) -> dict[int, dict[str, Any]]:
    variants = _variants(figure)
    return {
        id(line): keywords_of(look_of(figure.runs[line.group], variants.index(variant_of(line))))
        for line in content.lines
        if line.role == "measured"
    }


def _entries(figure: Composed) -> Iterator[tuple[Any, str]]:
    """Handles and labels of the legend: runs that are drawn, variants in grey, then nulls and limits."""
    contents = [panel.content for panel in figure.panels]
    lines = [line for content in contents if isinstance(content, Lines) for line in content.lines]
    drawn = {line.group for line in lines if line.role == "measured"}
    drawn |= {run for content in contents if isinstance(content, Points) for run in content.points}
    for run, number in figure.runs.items():
        if run in drawn:
            yield Line2D([], [], **keywords_of(look_of(number))), legend_name(run, len(figure.runs))
    for place, variant in enumerate(_variants(figure)):
        if variant:
            yield Line2D([], [], color="0.4", linestyle=DASHES[place % len(DASHES)]), plain(variant)
    yield from _grey_entries(lines)
    if any(isinstance(content, Lines) and content.healthy is not None for content in contents):
        yield Patch(color=HEALTHY, linewidth=0), "healthy"
    if any(panel.differs for panel in figure.panels):
        yield Line2D([], [], color="0.2", linewidth=2.5), DIFFERS


def _grey_entries(lines: Sequence[Line]) -> Iterator[tuple[Any, str]]:
    """What has the colour of its run, once in grey for all runs."""
    roles = {line.role for line in lines}
    if "null" in roles:
        yield Line2D([], [], color="0.4", **NULL), NOISE_BASELINE
    if "mark" in roles:
        yield Line2D([], [], color="0.8", **MARK), "a verdict warns or fails"


def _unnamed_thresholds(figure: Composed, axes: Iterable[Axes]) -> list[tuple[Any, str]]:
    """Thresholds without room for their names."""
    names = {
        plain(line.label)
        for panel in figure.panels
        if isinstance(panel.content, Lines)
        for line in panel.content.lines
        if line.role == "threshold"
    }
    drawn = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    return list({label: (handle, label) for handle, label in drawn if label in names}.values())


def _mark_differences(axes: Axes, panel: LetteredPanel) -> None:
    """A bar along the bottom where groups of runs differ."""
    for first, last in panel.differs:
        # In the height of the axes: it hides no value, whatever their scale.
        axes.plot(
            [first, last],
            [0.0, 0.0],
            color="0.2",
            linewidth=2.5,
            solid_capstyle="butt",
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
        )


def _plot_points(axes: Axes, content: Points, figure: Composed) -> None:
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor="0.5", linewidth=0.7))
    axes.axhline(0, color="0.85", linewidth=0.5, zorder=0)
    axes.axvline(0, color="0.85", linewidth=0.5, zorder=0)
    shown = {run: _placed(values, content.radial_log) for run, values in content.points.items()}
    for run, values in shown.items():
        style = keywords_of(look_of(figure.runs[run])) | {"linestyle": "", "markersize": 2.8}
        axes.plot(values.real, values.imag, alpha=0.8, **style)
    reach = max([1.1, *(1.1 * float(np.abs(values).max()) for values in shown.values())])
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    if content.radial_log:
        ticks = _radial_ticks(2**reach - 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([float(np.sign(tick) * np.log2(1 + abs(tick))) for tick in ticks])
            axis.set_ticklabels([f"{tick:g}".replace("-", "−") for tick in ticks])


def _radial_ticks(reach: float) -> list[float]:
    """Numbers at an axis of log₂(1 + |λ|): 0, 1 and the largest power of ten below its end, on both sides.

    Examples
    --------
    >>> _radial_ticks(1.2), _radial_ticks(250.0)
    ([-1.0, 0.0, 1.0], [-100.0, -1.0, 0.0, 1.0, 100.0])
    """
    largest = 10.0 ** np.floor(np.log10(reach))
    positive = sorted({1.0, float(max(largest, 1.0))})
    return [*(-tick for tick in reversed(positive)), 0.0, *positive]


def _placed(values: np.ndarray, radial_log: bool) -> np.ndarray:
    """Where points are drawn, flat."""
    flat = np.ravel(values)
    size = np.abs(flat)
    # 0 stays 0, and 1 stays 1.
    return flat * np.log2(1 + size) / np.where(size > 0, size, 1.0) if radial_log else flat
