"""How much of the depth is used? The turn of each step against that of independent branches."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.quantities.token_steps import Steps

PER_SEQUENCE = "over the tokens of a sequence, mean over sequences"


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
def relative_turn(token_steps: Steps) -> xr.Variable:
    r"""How much a step turns the state, relative to independent branches; near 0 it is the identity up to a factor.

    .. math:: \angle(x_{l-1}, x_l) \Big/ \arctan \sqrt{\frac{a}{\|x_0\|^2 + (k - 1)\,a}}

    a is the mean square of what the steps of this network add across the state, token by token, and k the number of the
    step: without the embedding, independent branches of one size turn the state by arctan √(1/k). It is relative to the
    network's own branches: the angle itself shows whether all of them do little. NaN at the embedding and the final norm.
    """
    is_branch = token_steps.is_branch[:, None, None]
    known = is_branch & ~np.isnan(token_steps.angle)
    count = known.sum(axis=0)
    mean = np.where(known, token_steps.across, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    before = token_steps.square[0] + (np.cumsum(is_branch, axis=0) - 1) * mean
    law = np.arctan(np.sqrt(mean / np.where(before > 0, before, np.nan)))
    expected = token_steps.by_sequence(np.where(known, law, np.nan))
    turned = token_steps.by_sequence(np.where(known, token_steps.angle, np.nan))
    # Branches that are all zero have no size to compare with.
    return xr.Variable(("depth", "stream", "sequence"), turned / np.where(expected > 0, expected, np.nan))


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
