"""Does what leaves a block still depend on what came in? The differences that came in bound those that can be lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.age import TASK, mapping_in, number_or_none
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, verdict
from depthscope.diagnostics.verdicts.rule import Kind

DISTINCT = "distinct_tokens"
"""Attribute of a run: how many different tokens the sampled sequences have, each on average and all together."""

FEWEST = 3  # different tokens, of which a rank can fall
FEW_TOKENS = 8  # different tokens, of fewer of which what is alike may be chance
# A Dong residual that rounding leaves of equal tokens.
EQUAL = 1e-5


def distinct(attrs: Mapping[str, Any], scope: str) -> float | None:
    """How many different tokens came in; None where the input has no numbers that name tokens.

    ``scope``: ``"per_sequence"`` or ``"in_all"``.
    """
    return number_or_none(mapping_in(attrs, DISTINCT).get(scope))


def has_few_tokens(attrs: Mapping[str, Any]) -> bool:
    """Whether what is alike in a batch may be chance, or its sequences are so short that all tokens are where sinks are."""
    each, of_all = distinct(attrs, "per_sequence"), distinct(attrs, "in_all")
    return (each is not None and each < FEWEST) or (of_all is not None and of_all < FEW_TOKENS)


def one_answer(attrs: Mapping[str, Any]) -> bool:
    """Whether the labels are one a sequence."""
    return mapping_in(attrs, TASK).get("targets_per_sequence") == 1


def below_input(values: xr.DataArray, attrs: Mapping[str, Any], scope: str) -> xr.DataArray | None:
    """Differences between tokens, 1 where they are as large as can be, relative to what came in; None where nothing did.

    Where the tokens are known to differ, a first state without differences is the network's own, and is judged as it is.
    """
    tokens, first = distinct(attrs, scope), float(values.isel(depth=0))
    if tokens is not None:
        return values if tokens >= FEWEST else None
    if math.isnan(first):
        return values
    if first < EQUAL:
        return None
    after = values / min(first, 1.0)
    return after.where(after["depth"] != after["depth"][0]) if "depth" in after.coords else after


# Sequences of random tokens have a share near 1; those of one language, whose positions say little, above 0.5.
SHARED_INPUT = 0.01


@verdict(
    Kind.FRESH,
    metric="sequence_share",
    judges="share of the variance of the states that is between sequences at the same position",
    formula="mean_t Var_s(u) / Var(u), u = x / ‖x‖",
    range="0 to 1",
    limits=Limits(warn=1e-4, fail=1e-8, above=False),
    follows_from=("rank_collapse", "common_vector"),
)
def equal_sequences(sequence_share: xr.DataArray, attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """All sequences have the same states: the network no longer sees its input.

    Look in that block for a mean over the batch, a row that is taken for all, or a mask that leaves only the position.
    """
    share = sequence_share.sel(stream="mean", drop=True)
    each, of_all = distinct(attrs, "per_sequence"), distinct(attrs, "in_all")
    if each is not None and of_all is not None and of_all > each:  # the sequences have different tokens
        yield Profile(share, begins=True)
    # Of equal sequences nothing else can be expected.
    elif float(share.isel(depth=0)) > SHARED_INPUT:
        later = xr.DataArray(np.arange(share.sizes["depth"]) > 0, dims="depth")
        yield Profile(share.where(later), begins=True)
