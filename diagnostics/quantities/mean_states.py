"""What is compared between depths? The mean over streams of every real token, all depths in memory at once.

Shapes: ``L`` depths, ``N`` real tokens, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States, by_kind


class MeanStates:
    """The mean over streams of every real token at every depth, loaded once.

    ``states``: the states.
    ``masks``: dims (tokens, sample, token): which tokens count, by kind.
    """

    def __init__(self, states: States, masks: xr.Variable) -> None:
        self._kinds = masks.values[:, states.mask]
        values, finite = [], []
        for depth in range(len(states)):
            views, of_views = states.load(depth)
            values.append(states.rows(views)[0])  # the first view is the mean
            finite.append(bool(of_views[0]))
        self.values = np.stack(values)
        self.finite = np.array(finite)

    @property
    def finite_pairs(self) -> np.ndarray:
        """Whether both depths of every pair are finite, (L, L): the others were replaced by zeros, see `States.load`."""
        return self.finite[:, None] & self.finite[None, :]

    def over_kinds(self, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Measure the tokens of each kind; what two kinds share is measured once.

        ``measure``: states (L, N, D) in, values (...) out.
        """

        def measure_kind(counted: np.ndarray) -> np.ndarray:
            # Without a copy where all tokens count: this is the largest array of an analysis.
            return measure(self.values if counted.all() else self.values[:, counted])

        return np.stack(by_kind(self._kinds, measure_kind))


@quantity
def mean_states(residual_states: States, token_masks: xr.Variable) -> MeanStates:
    """The mean over streams of every real token at every depth."""
    return MeanStates(residual_states, token_masks)
