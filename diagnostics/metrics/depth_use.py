"""How much of the depth is used? The turn of each step against that of independent branches, and how the variance grows."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.states import States
from depthscope.diagnostics.quantities.token_steps import Steps, ends_branch

PER_SEQUENCE = "over the tokens of a sequence, mean over sequences"


@metric(
    symbol=r"\|x_l\|^2 / (\|x_0\|^2 + \textstyle\sum_{k \le l} \|b_k\|^2)",
    dims="depth stream",
    scale="log",
    cite=f"{OURS}, after sun2025curse",
    basis="stream",
    null="1 for branches that are independent of the state",
    estimator=PER_SEQUENCE,
    of_sequences=True,
)
def variance_growth(token_steps: Steps) -> xr.Variable:
    r"""Growth of the state beyond that of independent branches; above 1 the branches add up, below they cancel.

    .. math:: \|x_l\|^2 \Big/ \Big(\|x_0\|^2 + \textstyle\sum_{k \le l} \|b_k\|^2\Big), \quad b_k = x_k - x_{k-1}

    This project's ratio, after Sun et al. 2025, who follow the variance of Pre-LN states: it grows linearly with depth for
    independent branches and up to exponentially for aligned ones. 1 where each branch is independent of the state that it is
    added to, at most l + 1; and the later blocks,
    whose branches are normalised, change the state the less the larger it is. NaN at the final norm.
    """
    added = np.where(token_steps.is_branch[:, None, None], token_steps.added, 0.0)
    independent = token_steps.square[0] + np.cumsum(added, axis=0)
    ratio = token_steps.square / np.where(independent > 0, independent, np.nan)
    ratio[1:][~token_steps.is_branch[1:]] = np.nan
    return xr.Variable(("depth", "stream", "sequence"), token_steps.by_sequence(ratio))


@metric(
    symbol=r"\angle(x_{l-1}, x_l) / \angle_{\mathrm{ind}}",
    dims="depth stream",
    scale="log",
    cite=OURS,
    basis="stream",
    null="1 for branches of one size that are independent of the state",
    estimator=f"mean angle over mean angle, {PER_SEQUENCE}",
    of_steps=True,
    of_sequences=True,
)
def relative_turn(token_steps: Steps, relative_turns: np.ndarray) -> xr.Variable:
    r"""How much a step turns the state, relative to independent branches; near 0 it is the identity up to a factor.

    .. math:: \angle(x_{l-1}, x_l) \Big/ \arctan \sqrt{\frac{a}{\|x_0\|^2 + (k - 1)\,a}}

    a is the mean square of what the steps of this network add across the state, token by token, and k the number of the
    step: without the embedding, independent branches of one size turn the state by arctan √(1/k). It is relative to the
    network's own branches: the angle itself shows whether all of them do little. NaN at the embedding and the final norm.
    """
    return xr.Variable(("depth", "stream", "sequence"), relative_turns)


@metric(
    symbol=r"\textstyle\sum_{k \le l} \min(1, \angle_k / \arctan \sqrt{1/k})",
    dims="depth stream",
    cite=OURS,
    basis="stream",
    null="the number of steps, for branches of the size of the first state that are independent of the state",
    estimator=f"mean angle over mean angle, {PER_SEQUENCE}",
    headline=True,
    of_sequences=True,
)
def effective_depth(token_steps: Steps) -> xr.Variable:
    r"""Effective depth: how many steps so far turn the state as much as independent branches of its first size would.

    .. math:: \textstyle\sum_{k \le l} \min\big(1, \angle(x_{k-1}, x_k) / \arctan \sqrt{1/k}\big)

    Independent branches of the size of the first state turn it by arctan √(1/k) in step k. A step that turns it by half of
    that counts half. Unlike `relative_turn`, which compares the steps with one another, it is near 0 for a network whose
    branches are all small. A step is a block, or half of one where the run shows states inside blocks.
    """
    is_branch = token_steps.is_branch[:, None, None]
    number = np.cumsum(is_branch, axis=0)
    turned = token_steps.by_sequence(np.where(is_branch, token_steps.angle, np.nan))
    expected = np.arctan(np.sqrt(1.0 / np.maximum(number, 1)))
    reached = np.cumsum(np.minimum(np.nan_to_num(turned / expected, nan=0.0), 1.0), axis=0)
    # A sequence without tokens, or with a state that is not finite, has no depth either.
    unknown = np.isnan(token_steps.by_sequence(token_steps.square))
    return xr.Variable(("depth", "stream", "sequence"), np.where(unknown, np.nan, reached))


@metric(
    symbol=r"1 - \|\bar{b}_l\|^2 / \overline{\|b_l\|^2}",
    dims="depth stream",
    scale="log",
    cite=OURS,
    basis="stream",
    null="1 for steps that are independent from token to token",
    estimator="over all real tokens",
    of_steps=True,
)
def step_spread(residual_states: States) -> xr.Variable:
    r"""How much of a step depends on the token; 0 where it adds the same vector to all of them.

    .. math:: 1 - \frac{\|\bar{b}_l\|^2}{\overline{\|b_l\|^2}}, \quad b_l = x_l - x_{l-1}

    A branch that writes nothing but its bias has 0, although it turns the states. NaN where a step adds nothing, and at the
    embedding and the final norm.
    """

    def measure(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        added = after - before
        size = (added**2).sum(-1).mean(-1)
        about = ((added - added.mean(1, keepdims=True)) ** 2).sum(-1).mean(-1)
        # What float32 leaves of equal steps is no spread.
        rounding = (np.finfo(np.float32).eps ** 2) * (after**2).sum(-1).mean(-1)
        return np.where(
            size > rounding, np.maximum(about - rounding, 0.0) / np.where(size > 0, size, 1.0), np.nan
        )

    return residual_states.over_steps(measure).where(xr.Variable(("depth",), ends_branch(residual_states)))
