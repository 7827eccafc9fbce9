"""Do all layers hold one representation? The verdict that this toolkit is for: hyper-connections were made to prevent it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, number, verdict
from depthscope.diagnostics.verdicts.inputs import has_few_tokens
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
WORDS = "the debiased CKA"
# What else of the states has to be alike, by metric: their mean over streams hides what differs between streams, and of
# large features alone CKA may be 1.
VIEWS = {
    "joined_cka": "of all streams joined",
    "least_stream_cka": "of the least similar stream",
    "trimmed_cka": "without large features",
}
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
    attrs: Mapping[str, Any],
    num_tokens: xr.DataArray | None = None,
    joined_cka: xr.DataArray | None = None,
    least_stream_cka: xr.DataArray | None = None,
    trimmed_cka: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """All layers hold one representation: the depth adds nothing.

    Raise the scale of the branches or their learning rate, look for a skip that is scaled up or a branch that is scaled down,
    and take fewer layers. Then see whether the loss without these blocks is the same: they can be left out.
    """
    if "unbiased" not in cka["estimator"] or has_few_tokens(attrs):
        return
    keep = _handed_on(cka)

    def pairs(of: xr.DataArray) -> np.ndarray:
        return of.sel(tokens="ordinary").transpose("depth", "other_depth").values[np.ix_(keep, keep)]

    table, turned = pairs(cka.sel(estimator="unbiased")), pairs(angular_distance)
    given = zip(VIEWS, (joined_cka, least_stream_cka, trimmed_cka), strict=True)
    views = {name: pairs(of) for name, of in given if of is not None}
    steps = len(table) - 1
    if steps < FEWEST_STEPS or not np.isfinite(table[~np.eye(len(table), dtype=bool)]).all():
        return
    still = np.abs(np.subtract.outer(np.arange(steps + 1), np.arange(steps + 1))) <= 1
    # All steps within a range are small where each is: kept apart from the angle between its ends.
    small = turned < np.where(still, STEP, np.inf)
    # Of a silent stream there is no CKA, and the other views decide.
    lowest = np.fmin.reduce([table, *views.values()])
    states = cka.isel(depth=keep, other_depth=0, estimator=0, tokens=0, drop=True).assign_coords(depth=keep)
    kinds = (
        (True, (table >= SAME) & (turned < TURNED), NEARLY_ALL),
        (True, (table >= SAME) & (turned < FIXED), HALF),
        (True, (table >= SAME) & small, NEARLY_ALL),
        (False, table >= ALIKE, ALL),
    )
    for failing, together, share in kinds:
        first, last = longest_range(together & (lowest >= ALIKE))
        if last - first >= max(FEWEST_STEPS, share * steps):
            part = slice(first, last + 1)
            told = _views(table, views, part) + _null(num_tokens)
            found = _one_representation(
                states, table[part, part], turned[part, part], first, told, failing=failing
            )
            # On the axis of all depths: undefined inside a block.
            yield replace(found, values=found.values.reindex(depth=np.arange(cka.sizes["depth"])))
            return
    # Nothing found: the two ends are what a reader asks for.
    yield Profile(states.copy(data=lowest[:, -1])[:1], f"{WORDS} with the last state is")


def _handed_on(table: xr.DataArray) -> np.ndarray:
    """The depths of the states that are handed from block to block: no final norm, nothing inside a block."""
    if "site" not in table.coords:
        return np.arange(table.sizes["depth"])
    return np.flatnonzero(~np.isin(table["site"].values.astype(object).astype(str), ["final", "mid"]))


def _one_representation(
    states: xr.DataArray, table: np.ndarray, turned: np.ndarray, first: int, more: str, *, failing: bool
) -> Profile:
    """What is found about one range of depths.

    ``states``: all of them; ``table, turned``: CKA and angles within the range, which begins with the state ``first``.
    ``more``: of other views and of unrelated states.
    """
    count, steps = len(table), len(states) - 1
    least = float(table.min())
    step = 180.0 * float(np.diagonal(turned, offset=1).max())
    limit = SAME if failing else ALIKE
    begins, ends = states["depth"].values[[first, first + count - 1]].tolist()
    layers = "All layers" if count - 1 == steps else f"{count - 1} of {steps} layers in a row"
    sentence = (
        f"{layers} hold one representation: every two states from depth {begins} to depth "
        f"{ends} are the same up to rotation (debiased CKA {least:.3f} or more{more}), "
        f"limit {number(limit)} ({DEFAULT}), and from end to end they turn by {number(180.0 * float(turned[0, -1]))}°, "
        f"where independent branches of the size of the first state turn them by {_law(count - 1):.0f}°. No step turns "
        f"them by more than {number(step)}°."
    )
    values = np.full(len(states), np.nan)
    # Of states that turn against each other it is no more than a warning.
    values[first : first + count] = least if failing else min(least, SAME)
    words = f"{WORDS} of the two least similar states is"
    return Profile(states.copy(data=values), words, sentence=sentence)


def _views(table: np.ndarray, views: Mapping[str, np.ndarray], part: slice) -> str:
    """The least CKA within a range by each view in which it is another one than in the mean over streams."""
    mean = float(table[part, part].min())
    least = {VIEWS[name]: float(of[part, part].min()) for name, of in views.items()}
    told = [f"{words} {value:.3f}" for words, value in least.items() if abs(value - mean) >= 5e-4]
    return f"; {', '.join(told)}" if told else ""


def _law(steps: int) -> float:
    """Degrees by which independent branches of the size of the first state turn it: arccos 1/√(L + 1)."""
    return float(np.degrees(np.arccos(1.0 / np.sqrt(steps + 1.0))))


def _null(num_tokens: xr.DataArray | None) -> str:
    """The debiased CKA of unrelated states: 0 with a standard deviation of about √2 / N."""
    if num_tokens is None:
        return ""
    count = num_tokens.sel(scope="data", tokens="ordinary").isel(depth=0, stream=0)
    return f"; of unrelated states 0 ± {number(2.0**0.5 / float(count))}"
