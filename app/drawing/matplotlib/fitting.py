"""Does every label fit where it is? Measured after the layout, and wrapped until none reaches a neighbour or the edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from depthscope.app.drawing.matplotlib.style import wrapped

# Layouts after which a label is left as it is: lines that are added make axes narrower, which may take one more.
MOST_LAYOUTS = 4
COLOUR_BAR = "<colorbar>"
"""The label that matplotlib gives the axes of a colour bar."""
GAP = 4.0
"""Points between a label and what is next to it: its width is that of outlines, which a screen rounds to its dots."""


class Label(NamedTuple):
    """A label with its words before they are wrapped, and the axes that it belongs to."""

    axes: Axes
    text: Text
    words: str


def label_axes(axes: Axes, x_label: str, y_label: str, inches: tuple[float, float]) -> list[Label]:
    """Label both axes, wrapped to a room in inches until `fit_labels` knows the real one."""
    words = (x_label, y_label)
    artists = (axes.xaxis.label, axes.yaxis.label)
    for artist, text, room in zip(artists, words, inches, strict=True):
        artist.set_text(wrapped(text, room))
    return [Label(axes, artist, text) for artist, text in zip(artists, words, strict=True)]


def fit_labels(canvas: Figure, labels: Sequence[Label]) -> None:
    """Lay a figure out, and wrap its labels to the room that this leaves them.

    ``canvas``: with an engine that lays it out.
    ``labels``: titles and labels of axes, also of colour bars.
    """
    engine = canvas.get_layout_engine()
    assert engine is not None
    # The layout leaves the widths of titles and labels out. It only gets tighter: wider rooms again would go back and forth.
    rooms = [float("inf")] * len(labels)
    for _ in range(MOST_LAYOUTS):
        engine.execute(canvas)
        taken = {axes: _taken(axes) for axes in canvas.axes}
        rooms = [min(room, _room(label, taken)) for room, label in zip(rooms, labels, strict=True)]
        lines = [
            wrapped(label.words, room / canvas.dpi, float(label.text.get_fontsize()))
            for room, label in zip(rooms, labels, strict=True)
        ]
        changed = [
            label.text for label, text in zip(labels, lines, strict=True) if label.text.get_text() != text
        ]
        for label, text in zip(labels, lines, strict=True):
            label.text.set_text(text)
        if not changed:
            return


def _taken(axes: Axes) -> Bbox:
    """What axes take with their ticks, and with their labels but for the overhang of these."""
    box = axes.get_tightbbox(for_layout_only=True)
    return axes.get_window_extent() if box is None else box


def _room(label: Label, taken: Mapping[Axes, Bbox]) -> float:
    """Pixels along a label."""
    own = label.axes.get_window_extent()
    canvas = label.axes.get_figure(root=True)
    assert canvas is not None
    if label.text is label.axes.yaxis.label:
        return own.height
    gap = GAP * canvas.dpi / 72
    row = {
        axes: box
        for axes, box in taken.items()
        if axes is not label.axes and box.y0 < own.y1 and own.y0 < box.y1
    }
    left = max([gap, *(box.x1 + gap for box in row.values() if box.x1 <= own.x0)])
    # Above its own colour bar a title may go on.
    ends = [box.x0 - gap for axes, box in row.items() if box.x0 >= own.x1 and axes.get_label() != COLOUR_BAR]
    right = min([canvas.bbox.width - gap, *ends])
    if label.text is label.axes.xaxis.label:
        middle = (own.x0 + own.x1) / 2
        return 2 * min(middle - left, right - middle)
    return right - own.x0
