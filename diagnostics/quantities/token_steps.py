"""What does each step do to each token? Sizes, what is added along and across the state, and the turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.states import States

# A final norm is no branch, and neither is what changes the streams before a block.
NO_BRANCH = ("final", "pre")
# Angle below which two float32 states may be multiples of one another.
ROUNDING = 4.0 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Steps:
    """What each step does to each token, arrays (L + 1, V, N); NaN where a state is zero or not finite."""

    states: States  # where they come from: its labels and its sequences
    square: np.ndarray  # ‖x_l‖²
    added: np.ndarray  # ‖x_l − x_{l−1}‖²
    across: np.ndarray  # the part of it across x_{l−1}, which turns the state and does not only scale it
    angle: np.ndarray  # angle between x_{l−1} and x_l, in rad

    @property
    def is_branch(self) -> np.ndarray:
        """Which depths end a branch, (L + 1,)."""
        return ends_branch(self.states)

    def by_sequence(self, values: np.ndarray) -> np.ndarray:
        """Mean over the tokens of each sequence of what is not NaN, (L + 1, V, N) in, (L + 1, V, S) out."""
        of_sequence = np.nonzero(self.states.mask)[0]
        means = np.full((*values.shape[:2], len(self.states.mask)), np.nan)
        for sequence in np.unique(of_sequence):
            part = values[..., of_sequence == sequence]
            count = (~np.isnan(part)).sum(-1)
            means[..., sequence] = np.nansum(part, -1) / np.where(count > 0, count, np.nan)
        return means


def ends_branch(states: States) -> np.ndarray:
    """Which depths end a branch, (L + 1,)."""
    found = np.arange(len(states)) > 0
    if "site" in states.coords:
        found &= ~np.isin(states.coords["site"].values.astype(object).astype(str), NO_BRANCH)
    return found


@quantity
def token_steps(residual_states: States) -> Steps:
    """Sizes and turns of all steps, token by token."""

    def measure(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        size = np.linalg.norm(before, axis=-1)
        added = after - before
        square = (added**2).sum(-1)
        along = (added * before).sum(-1) / np.where(size > 0, size, np.nan)
        # From what is added, and not from the cosine of two states: 1 − cos² of a small turn has lost its digits.
        across = np.maximum(square - along**2, 0.0)
        # A state that is only scaled is turned by the rounding of its numbers.
        across[across < (ROUNDING * np.linalg.norm(after, axis=-1)) ** 2] = 0.0
        angle = np.arctan2(np.sqrt(across), size + along)
        return np.stack([(after**2).sum(-1), square, across, angle], axis=-1)

    found = residual_states.over_token_steps(measure, lambda values: values, ("row", "part")).values
    square, added, across, angle = np.moveaxis(found, -1, 0)
    views, finite = residual_states.load(0)
    first = (residual_states.rows(views).astype(np.float64) ** 2).sum(-1)
    square[0] = np.where(finite[:, None], first, np.nan)
    return Steps(residual_states, square, added, across, angle)
