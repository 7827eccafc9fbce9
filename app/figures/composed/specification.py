"""What is a figure of several panels before it is drawn? Panels with letters, and the words about all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from depthscope.app.figures.specification import Array, Figure


# Without `eq`, here and below: arrays compare element by element, which has no truth value.
@dataclass(frozen=True, eq=False)
class Points:
    """Points of some runs in the complex plane, with the unit circle.

    ``name, title``: as of any figure.
    ``x_label, y_label``: axes.
    ``points``: run name → complex numbers of any shape.
    ``caption, alt, metric``: as of any figure.
    ``sources``: bibliography keys.
    ``runs``: all runs that are shown together, with the numbers of their colours; see `Lines`.
    ``radial_log``: whether distances from the origin are log₂(1 + |z|), which leaves the unit circle where it is.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    points: Mapping[str, Array]
    caption: str = ""
    alt: str = ""
    metric: str = ""
    sources: tuple[str, ...] = ()
    runs: Mapping[str, int] = field(default_factory=dict)
    radial_log: bool = False


@dataclass(frozen=True, eq=False)
class LetteredPanel:
    """One panel of a composed figure.

    ``key``: its name, the same whichever letter it has: the key of ``axes=``, and part of the name of its data.
    ``title``: what is printed after its letter.
    ``content``: what is drawn.
    ``differs``: ranges of the horizontal axis in which groups of runs differ significantly.
    """

    key: str
    title: str
    content: Figure | Points
    differs: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Composed:
    """A figure of panels that answers one question of a paper.

    ``name, title``: key of the register, and the beginning of the caption.
    ``panels``: in the order of their letters.
    ``runs``: all runs that are shown, with the numbers of their colours.
    ``caption, alt``: words below the figure, and for those who do not see it.
    ``left_out``: panels that no run can feed, with the reason.
    """

    name: str
    title: str
    panels: tuple[LetteredPanel, ...]
    runs: Mapping[str, int]
    caption: str = ""
    alt: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are drawn."""
        return tuple(dict.fromkeys(panel.content.metric for panel in self.panels if panel.content.metric))

    @property
    def sources(self) -> tuple[str, ...]:
        """Bibliography keys of laws and nulls that are drawn."""
        return tuple(dict.fromkeys(key for panel in self.panels for key in panel.content.sources))
