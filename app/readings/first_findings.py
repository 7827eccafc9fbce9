"""At which step of a training did each finding begin? Some steps are judged, and those between them where an answer lies."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import numpy as np

from depthscope.app.readings.training_history import TrainingHistory
from depthscope.diagnostics import Finding, Severity, judge

SPREAD = 32
"""Steps of a history that are judged first. A heuristic of ours: each takes some hundredths of a second."""

Key = tuple[str, str | None, str]
Moment = tuple[int, float]
"""A step, and when it was measured: a training that was resumed has other numbers for the same step."""


@dataclass(frozen=True)
class Begun:
    """A finding and the first judged step that has it."""

    finding: Finding  # as it is at that step
    step: int  # of the training
    before: int | None  # the judged step before it, which does not have it; None where there is none
    lasts: bool  # whether the last judged step has it too


class FirstFindings:
    """Warnings and failures of a history, by the step at which they begin.

    Verdicts judge one step at a time, by what was measured in it. A finding that comes and goes between two judged steps is
    not seen: `num_judged` is shown with the result.

    ``history``: may grow.
    """

    def __init__(self, history: TrainingHistory) -> None:
        # Weak: it lives as long as the history.
        self._history: TrainingHistory = weakref.proxy(history)
        self._judged: dict[Moment, dict[Key, Finding]] = {}

    @property
    def num_judged(self) -> int:
        """Steps that were judged."""
        return len(self._known())

    def look(self, seconds: float) -> bool:
        """Judge further steps for a while."""
        end = time.monotonic() + seconds
        while (position := self._next()) is not None:
            analysis = self._history.analysis_at(position)
            self._judged[self._moment(position)] = {
                (finding.verdict, finding.stream, finding.quantity): finding
                for finding in reversed(judge(analysis))  # the worst of a verdict last, which stays
                if finding.severity >= Severity.WARN
            }
            if time.monotonic() > end:
                return self._next() is not None
        return False

    def begun(self) -> list[Begun]:
        """Findings by the step at which they begin."""
        known = self._known()
        found = []
        for key, place in self._firsts(known).items():
            position = known[place]
            found.append(
                Begun(
                    self._judged[self._moment(position)][key],
                    self._moment(position)[0],
                    self._moment(known[place - 1])[0] if place else None,
                    key in self._judged[self._moment(known[-1])],
                )
            )
        return sorted(found, key=lambda each: (each.step, -each.finding.severity))

    def _moment(self, position: int) -> Moment:
        times = self._history.times
        return int(self._history.steps[position]), 0.0 if times is None else float(times[position])

    def _known(self) -> list[int]:
        """Positions of the judged steps that the history still has."""
        steps = self._history.steps
        found = [(int(np.searchsorted(steps, step)), step) for step, _ in self._judged]
        valid = {position for position, step in found if position < len(steps) and steps[position] == step}
        return sorted(position for position in valid if self._moment(position) in self._judged)

    def _firsts(self, known: list[int]) -> dict[Key, int]:
        firsts: dict[Key, int] = {}
        for place, position in enumerate(known):
            for key in self._judged[self._moment(position)]:
                firsts.setdefault(key, place)
        return firsts

    def _next(self) -> int | None:
        """The best position to judge: the last one, some over all, then between the last without a finding and the first."""
        total = len(self._history.steps)
        known = self._known()
        # Strides are powers of two: of a history that grows, those that were judged stay in the grid.
        stride = 1
        while total > SPREAD * stride:
            stride *= 2
        missing = {0, total - 1, *range(0, total, stride)}.difference(known)
        if total and missing:
            return max(missing) if total - 1 in missing else min(missing)
        for place in self._firsts(known).values():
            if place and known[place] - known[place - 1] > 1:
                return (known[place] + known[place - 1]) // 2
        return None
