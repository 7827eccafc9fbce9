"""What is known about the chosen runs? Those that were analysed, and those that could not be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import xarray as xr

from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.figures import FigureKind, available
from depthscope.app.figures.build.values import feeds
from depthscope.app.readings.readings import Reading


@dataclass(frozen=True)
class ChosenRuns:
    """The runs that a visitor has chosen.

    Parameters
    ----------
    readings : mapping
        Run (or run/chain) name → reading.
    unreadable : tuple of UnreadableRun
        Runs that could not be read, with the reason.
    """

    readings: Mapping[str, Reading]
    unreadable: tuple[UnreadableRun, ...]

    @cached_property
    def analyses(self) -> dict[str, xr.Dataset]:
        """Run name → analysis, in the order of the runs' colours."""
        return {name: reading.analysis for name, reading in self.readings.items()}

    def figures(self, question: str) -> dict[str, FigureKind]:
        """Figures of one question that the chosen runs can feed.

        Parameters
        ----------
        question : str
            A question of the register of figures.

        Returns
        -------
        dict
            Name → kind.
        """
        return {name: kind for name, kind in available(self.analyses).items() if kind.question == question}

    def feeding(self, *needs: Iterable[str]) -> list[str]:
        """Names of the runs that can feed one of several figures.

        Parameters
        ----------
        *needs : iterable of str
            For each figure the variables without which it has nothing to draw.

        Returns
        -------
        list of str
        """
        return [
            name for name, data in self.analyses.items() if any(feeds(data, tuple(each)) for each in needs)
        ]
