"""How is an axis of a hundred thousand positions drawn in some hundred cells? In bins that differ by one position at most."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class Bins:
    """Positions along an axis, as many to a bin as leave at most a number of bins.

    ``positions``: (position,), increasing: steps, depths, tokens.
    ``starts``: (bin,): where in `positions` each bin begins.
    """

    positions: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray, most: int) -> Bins:
        """Bins of nearly the same number of positions.

        Returns: One position a bin where there are few enough.
        """
        count = min(len(positions), most)
        # In integers: rounded quotients may begin two bins at one position.
        return cls(positions, np.arange(count) * len(positions) // max(count, 1))

    @property
    def largest(self) -> int:
        """Positions of the largest bin."""
        return int(np.diff([*self.starts, len(self.positions)]).max(initial=0))

    @property
    def centres(self) -> np.ndarray:
        """(bin,): the middle of each bin."""
        ends = np.append(self.starts[1:], len(self.positions)) - 1
        return (self.positions[self.starts] + self.positions[ends]) / 2 if len(self.starts) else np.zeros(0)

    def least_and_greatest(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each bin the least and the greatest number; NaN where it has none."""
        if not len(self.starts):
            return values[:0], values[:0]
        # fmin and fmax: a step without a number does not hide the others of its bin.
        return np.fmin.reduceat(values, self.starts, axis=0), np.fmax.reduceat(values, self.starts, axis=0)

    def most_unusual(self, values: np.ndarray, *, log: bool = False) -> np.ndarray:
        """Of each bin that of its extremes that lies farther from the median of its row over all bins.

        ``log``: measure the distance in decades, as a logarithmic scale of colours shows it.

        Examples
        --------
        >>> spike = np.ones((1000, 1))
        >>> spike[123], spike[777] = 50.0, -3.0
        >>> found = Bins.of(np.arange(1000), 10).most_unusual(spike)[:, 0]
        >>> found.tolist()
        [1.0, 50.0, 1.0, 1.0, 1.0, 1.0, 1.0, -3.0, 1.0, 1.0]
        """
        low, high = self.least_and_greatest(values)
        with np.errstate(divide="ignore", invalid="ignore"):
            below, above = (np.log10(low), np.log10(high)) if log else (low, high)
            # Of the bins' extremes and not of every step: the same to the eye, at a hundredth of the time.
            usual = np.nanmedian(np.stack([below, above]), axis=(0, 1)) if low.size else np.zeros(0)
            return np.where(usual - below > above - usual, low, high)

    def curve(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A line through the least and the greatest number of each bin, in the order in which they came."""
        if self.largest <= 2:
            return self.positions.astype(float), values
        chosen = []
        for start, end in zip(self.starts, [*self.starts[1:], len(self.positions)], strict=True):
            part = values[start:end]
            if np.isfinite(part).any():
                chosen += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
            else:
                chosen.append(start)
        return self.positions[chosen].astype(float), values[chosen]


def reduce_blocks(
    matrix: np.ndarray, rows: Bins, columns: Bins, *, by: Literal["mean", "largest"]
) -> np.ndarray:
    """A matrix with one number for each bin of rows and bin of columns; NaN only where a block has no number.

    ``rows, columns``: of its two axes, each by itself.
    ``by``: what represents the numbers of a block.
    Returns: (bin of rows, bin of columns), float64.
    """
    values = np.asarray(matrix, dtype=np.float64)

    def over_blocks(function: np.ufunc, numbers: np.ndarray) -> np.ndarray:
        of_rows = function.reduceat(numbers, rows.starts, axis=0)
        return np.asarray(function.reduceat(of_rows, columns.starts, axis=1))

    if by == "largest":
        return over_blocks(np.fmax, values)
    missing = np.isnan(values)
    # Infinite numbers stay: a block with one has no finite mean.
    with np.errstate(invalid="ignore"):
        return over_blocks(np.add, np.where(missing, 0.0, values)) / over_blocks(np.add, ~missing * 1.0)


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders between the cells around positions; one more than there are positions."""
    centres = np.asarray(centres, dtype=np.float64)
    # A single cell has no neighbour to take its width from.
    if centres.size < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = np.array([(a + b) / 2 for a, b in pairwise(centres)])
    first, last = centres[0] - (middle[0] - centres[0]), centres[-1] + (centres[-1] - middle[-1])
    return np.concatenate([[first], middle, [last]])


FLAT = 1e-4
"""Values that differ by a smaller share than this count as one value: an axis fitted to them would magnify rounding
into a trend. A heuristic of ours."""


def visible_limits(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, 5 % beyond the values where these are `FLAT`."""
    # Relative to the size of the values, as rounding is: a difference of 1e-3 is a trend at 1 and noise at 1e5.
    size = max(abs(low), abs(high))
    if high - low >= FLAT * size:
        return low, high
    return low - 0.05 * size, high + 0.05 * size
