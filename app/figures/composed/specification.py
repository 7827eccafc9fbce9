"""What is a figure of several panels before it is drawn? Panels with letters, and the words about all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from depthscope.app.figures.specification import Figure
from depthscope.app.readings.readings import Reading
from depthscope.diagnostics.errors import InputError


@dataclass(frozen=True, eq=False)
class LetteredPanel:
    """One panel of a composed figure.

    ``key``: its name, the same whichever letter it has: the key of ``axes=``, and part of the name of its data.
    ``title``: what is printed after its letter.
    ``content``: what is drawn.
    """

    key: str
    title: str
    content: Figure


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


def groups_of(readings: Sequence[Reading], by: str) -> dict[str, str]:
    """The group of each run, by an attribute such as ``"family"``; empty for no groups."""
    if not by:
        return {}
    for reading in readings:
        if reading.attrs.get(by) is None:
            known = ", ".join(sorted(name for name, value in reading.attrs.items() if np.isscalar(value)))
            raise InputError(f"run {reading.name} has no attribute {by!r} to group by; it has {known}")
    return {reading.name: str(reading.attrs[by]) for reading in readings}
