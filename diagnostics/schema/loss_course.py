"""How far has a loss risen above its lowest? Each loss of a training is compared with those before it."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from statistics import median

# Losses are compared in medians of an eighth of all of them: three in a short training, so that one odd batch is no rise, and
# up to a hundred, where the lowest of many medians would otherwise be that of chance. Heuristic.
SHARE, FEWEST, MOST = 8, 3, 100
# Typical changes from one batch to the next by which the lowest and the highest of many medians differ by chance, for a median
# of one loss. Heuristic: of white noise the change is 0.95 standard deviations, and 6 are exceeded once in 20 000 trainings.
SURE = 6.0
MOST_CHANGES = 2000


class LossCourse:
    """The losses of a training so far.

    ``losses``: those of an earlier attempt that goes on.

    Examples
    --------
    >>> course = LossCourse([4.0, 4.0, 4.0, 2.0, 2.0, 2.0])
    >>> course.add(2.0), course.add(6.0), course.add(6.0)
    (0.0, 0.0, 1.0)
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: list[float] = []
        self._changes: list[float] = []  # from each to the next one, sorted: the typical one is noise
        self._width = 0
        self._first = self._lowest = math.nan  # of the medians of so many losses each
        for loss in losses:
            self.add(loss)

    def add(self, loss: float | None) -> float:
        """Add the loss of one step; returns its rise above the lowest, over the loss at the start.

        Of the rise what the noise of single batches may be is taken off. A loss that is not finite is left out. NaN where too
        few losses are known, or where they began at zero or below.
        """
        if loss is None or not math.isfinite(loss):
            return math.nan
        losses = self._losses
        if losses:
            insort(self._changes, abs(loss - losses[-1]))
            self._changes = self._changes[:: 1 + (len(self._changes) > MOST_CHANGES)]
        losses.append(loss)
        if len(losses) <= FEWEST:
            return math.nan
        width = min(MOST, max(FEWEST, len(losses) // SHARE))
        if width != self._width:  # seldom, in which case all blocks are new ones
            ends = range(width, len(losses) + 1, width)
            blocks = [median(losses[end - width : end]) for end in ends]
            self._width, self._first, self._lowest = width, blocks[0], min(blocks)
        elif len(losses) % width == 0:
            self._lowest = min(self._lowest, median(losses[-width:]))
        return self._rise(median(losses[-width:]))

    def _rise(self, present: float) -> float:
        """From the lowest block, over the first one; or from the first loss, where the training went wrong at once."""
        noise = SURE * self._changes[len(self._changes) // 2]
        starts = [
            (self._lowest, noise * self._width**-0.5, self._first),
            (self._losses[0], noise, self._losses[0]),
        ]
        if any(scale <= 0 for _, _, scale in starts):
            return math.nan
        return max(0.0, *((present - low - chance) / scale for low, chance, scale in starts))
