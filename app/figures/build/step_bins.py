"""How is a history of a hundred thousand steps drawn in some hundred columns? By the extremes of each: no spike is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["StepBins"]


@dataclass(frozen=True, eq=False)
class StepBins:
    """Measured steps of a range, as many to a bin as leave at most a number of bins.

    Parameters
    ----------
    steps : ndarray
        (step,), increasing: those of the range.
    starts : ndarray
        (bin,): where in `steps` each bin begins.
    """

    steps: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, steps: np.ndarray, most: int) -> StepBins:
        """Bins of nearly the same number of steps.

        Parameters
        ----------
        steps : ndarray
            (step,), increasing.
        most : int
            Bins at most.

        Returns
        -------
        StepBins
            One step a bin where there are few enough.

        Examples
        --------
        >>> bins = StepBins.of(np.arange(10), 5)
        >>> bins.largest, bins.centres.tolist()
        (2, [0.5, 2.5, 4.5, 6.5, 8.5])
        """
        count = min(len(steps), most)
        return cls(steps, np.floor(np.arange(count) * (len(steps) / max(count, 1))).astype(int))

    @property
    def largest(self) -> int:
        """Steps of the largest bin."""
        return int(np.diff([*self.starts, len(self.steps)]).max(initial=0))

    @property
    def centres(self) -> np.ndarray:
        """(bin,): the step in the middle of each bin."""
        ends = np.append(self.starts[1:], len(self.steps)) - 1
        return (self.steps[self.starts] + self.steps[ends]) / 2 if len(self.starts) else np.zeros(0)

    def least_and_greatest(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each bin the least and the greatest number; NaN where it has none.

        Parameters
        ----------
        values : ndarray
            (step, …), of the same steps.

        Returns
        -------
        tuple of two ndarray
            (bin, …).
        """
        if not len(self.starts):
            return values[:0], values[:0]
        # fmin and fmax: a step without a number does not hide the others of its bin.
        return np.fmin.reduceat(values, self.starts, axis=0), np.fmax.reduceat(values, self.starts, axis=0)

    def most_unusual(self, values: np.ndarray, *, log: bool = False) -> np.ndarray:
        """Of each bin that of its extremes that lies farther from the median of its row over all bins.

        Parameters
        ----------
        values : ndarray
            (step, row).
        log : bool
            Measure the distance in decades, as a logarithmic scale of colours shows it.

        Returns
        -------
        ndarray
            (bin, row).

        Examples
        --------
        >>> spike = np.ones((1000, 1))
        >>> spike[123], spike[777] = 50.0, -3.0
        >>> found = StepBins.of(np.arange(1000), 10).most_unusual(spike)[:, 0]
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
        """A line through the least and the greatest number of each bin, in the order in which they came.

        Parameters
        ----------
        values : ndarray
            (step,).

        Returns
        -------
        tuple of two ndarray
            Steps and numbers; all of them where each bin has one step.
        """
        if self.largest <= 2:
            return self.steps.astype(float), values
        chosen = []
        for start, end in zip(self.starts, [*self.starts[1:], len(self.steps)], strict=True):
            part = values[start:end]
            if np.isfinite(part).any():
                chosen += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
            else:
                chosen.append(start)
        return self.steps[chosen].astype(float), values[chosen]
