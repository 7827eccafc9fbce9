"""Do all layers hold one representation? The verdict that this toolkit is for: hyper-connections were made to prevent it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.age import Inputs
from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, number, verdict
from depthscope.diagnostics.verdicts.rule import Kind

# Every two states of 16 collapsed blocks have a debiased CKA of 1.000, and the ends an angle of 0.003 π; of a fresh Pre-LN
# stack 0.70 and 0.25 π, of trained residual, HC and mHC networks 0.56 to 0.67, of SmolLM2 0.28 and 0.48 π.
SAME, ALIKE = 0.99, 0.95
# Share of π that no state of a collapsed range is turned against another one: 9 degrees.
TURNED = 0.05
# The same of half of the depth, which healthy networks may well turn by less than 9 degrees.
FIXED = 0.02
# One degree: blocks that all turn the states by less do nothing, wherever the sum of them leads.
STEP = 1.0 / 180.0
# What else of the states has to be alike: their mean over streams hides what differs between streams, and of large features
# alone CKA may be 1.
VIEWS = ("of all streams joined", "of the least similar stream", "without large features")
# A step between two depths is a block, or half of one. Fewer cannot turn the states by much in a healthy network either.
FEWEST_STEPS = 4
# Share of the steps that a range must span.
HALF, NEARLY_ALL, ALL = 0.5, 0.75, 1.0


def longest_range(together: np.ndarray) -> tuple[int, int]:
    """The longest range of depths of which every two belong together.

    Returns: First and last depth, inclusive; the first of the longest.

    Examples
    --------
    >>> longest_range(np.array([[1, 0, 0], [0, 1, 1], [0, 1, 1]], bool))
    (1, 2)
    """
    best, start = (0, 0), 0
    for end in range(len(together)):
        # The range that ends here begins after the last depth that does not belong to this one.
        apart = np.flatnonzero(~together[start:end, end])
        start += int(apart[-1]) + 1 if len(apart) else 0
        if end - start > best[1] - best[0]:
            best = start, end
    return best


# What grows or fades at every connection leaves all states alike beside it: then that is the finding.
@verdict(
    Kind.LOSS,
    metric="cka",
    judges="debiased CKA of the two least similar states of the longest range of blocks that hold one representation",
    formula="min CKA(x_i, x_j), first ≤ i < j ≤ last",
    range="−1 to 1",
    limits=Limits(warn=ALIKE, fail=SAME, scale="cosine"),
    follows_from=("gain_explosion", "exploding_state"),
    tried=True,
)
def same_representation(
    cka: xr.DataArray,
    angular_distance: xr.DataArray,
    inputs: Inputs,
    num_tokens: xr.DataArray | None = None,
    joined_cka: xr.DataArray | None = None,
    least_stream_cka: xr.DataArray | None = None,
    trimmed_cka: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """All layers hold one representation: the depth adds nothing.

    Raise the scale of the branches or their learning rate, look for a skip that is scaled up or a branch that is scaled down,
    and take fewer layers. Then see whether the loss without these blocks is the same: they can be left out.
    """
    if "unbiased" not in cka["estimator"] or inputs.are_few:
        return
    keep = _handed_on(cka)

    def pairs(of: xr.DataArray) -> np.ndarray:
        return of.sel(tokens="ordinary").transpose("depth", "other_depth").values[np.ix_(keep, keep)]

    table, turned = pairs(cka.sel(estimator="unbiased")), pairs(angular_distance)
    given = zip(VIEWS, (joined_cka, least_stream_cka, trimmed_cka), strict=True)
    views = {words: pairs(of) for words, of in given if of is not None}
    steps = len(table) - 1
    if steps < FEWEST_STEPS or not np.isfinite(table[~np.eye(len(table), dtype=bool)]).all():
        return
    still = np.abs(np.subtract.outer(np.arange(steps + 1), np.arange(steps + 1))) <= 1
    # All steps within a range are small where each is: kept apart from the angle between its ends.
    small = turned < np.where(still, STEP, np.inf)
    # Of a silent stream there is no CKA, and the other views decide.
    lowest = np.fmin.reduce([table, *views.values()])
    kinds = (
        (SAME, (table >= SAME) & (turned < TURNED), NEARLY_ALL),
        (SAME, (table >= SAME) & (turned < FIXED), HALF),
        (SAME, (table >= SAME) & small, NEARLY_ALL),
        (ALIKE, table >= ALIKE, ALL),
    )
    states = cka.isel(other_depth=0, estimator=0, tokens=0, drop=True)
    values = np.full(states.sizes["depth"], np.nan)
    for limit, together, share in kinds:
        first, last = longest_range(together & (lowest >= ALIKE))
        if last - first < max(FEWEST_STEPS, share * steps):
            continue
        part = slice(first, last + 1)
        least, angles = float(table[part, part].min()), 180.0 * turned[part, part]
        others = {words: float(of[part, part].min()) for words, of in views.items()}
        more = "".join(f"; {words} {of:.3f}" for words, of in others.items() if abs(of - least) >= 5e-4)
        law = np.degrees(np.arccos((last - first + 1.0) ** -0.5))  # arccos 1/√(L + 1) of L branches
        layers = "All layers" if last - first == steps else f"{last - first} of {steps} layers in a row"
        sentence = (
            f"{layers} hold one representation: every two states from depth {keep[first]} to depth {keep[last]} are the same "
            f"up to rotation (debiased CKA {least:.3f} or more{more}{_null(num_tokens)}), limit {number(limit)} ({DEFAULT}), "
            f"and from end to end they turn by {number(float(angles[0, -1]))}°, where independent branches of the size of the "
            f"first state turn them by {law:.0f}°. No step turns them by more than "
            f"{number(float(np.diagonal(angles, offset=1).max()))}°."
        )
        # On the axis of all depths, undefined inside a block. Of states that turn against each other it is a warning.
        values[keep[part]] = least if limit == SAME else min(least, SAME)
        yield Profile(states.copy(data=values), sentence=sentence)
        return
    # Nothing found: the two ends are what a reader asks for.
    values[keep[0]] = lowest[0, -1]
    yield Profile(states.copy(data=values), "debiased CKA with the last state")


def _handed_on(table: xr.DataArray) -> np.ndarray:
    """The depths of the states that are handed from block to block: no final norm, nothing inside a block."""
    if "site" not in table.coords:
        return np.arange(table.sizes["depth"])
    return np.flatnonzero(~np.isin(table["site"].values.astype(object).astype(str), ["final", "mid"]))


def _null(num_tokens: xr.DataArray | None) -> str:
    """The debiased CKA of unrelated states: 0 with a standard deviation of about √2 / N."""
    if num_tokens is None:
        return ""
    count = num_tokens.sel(scope="data", tokens="ordinary").isel(depth=0, stream=0)
    return f"; of unrelated states 0 ± {number(2.0**0.5 / float(count))}"
