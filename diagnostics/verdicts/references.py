"""What could this batch show at all? The differences that came in bound those that can be lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import xarray as xr

from depthscope.diagnostics.verdicts.age import task_of
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, verdict

DISTINCT = "distinct_tokens"
"""Attribute of a run: how many different tokens the sampled sequences have, each on average and all together."""

FEWEST = 3  # different tokens, of which a rank can fall
# A Dong residual that rounding leaves of equal tokens.
EQUAL = 1e-5


def distinct(attrs: Mapping[str, Any], scope: str) -> float | None:
    """How many different tokens came in; None where the input has no numbers that name tokens.

    ``scope``: ``"per_sequence"`` or ``"in_all"``.
    """
    known = attrs.get(DISTINCT)
    found = known.get(scope) if isinstance(known, Mapping) else None
    return float(found) if isinstance(found, (int, float)) else None


def one_answer(attrs: Mapping[str, Any]) -> bool:
    """Whether the labels are one a sequence."""
    return task_of(attrs).get("targets_per_sequence") == 1


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


@verdict(
    metric="dong_residual",
    judges=Number(
        "differences between the tokens, or the sequences, that came in",
        "Dong residual at the embedding",
        "0 or more",
    ),
    limits=Limits(info=EQUAL, above=False),
    about="reading",
)
def batch_without_differences(
    dong_residual: xr.DataArray,
    attrs: Mapping[str, Any],
    sequence_share: xr.DataArray | None = None,
    num_tokens: xr.DataArray | None = None,
) -> Iterable[Profile] | None:
    """The tokens of this batch do not differ, or its sequences do not.

    Capture the network on text or data with different tokens in every sequence, and different sequences.
    """
    if num_tokens is not None and float(num_tokens.sel(scope="sequence", tokens="all").max()) <= 1.0:
        return None  # data without tokens, which has no sequences to collapse
    tokens = distinct(attrs, "per_sequence")
    first = dong_residual.sel(tokens="ordinary", stream="mean", drop=True).isel(depth=0, drop=True)
    if tokens is None and not float(first) < EQUAL:
        return None
    if tokens is not None and tokens >= FEWEST:
        return _equal_sequences(first, attrs, sequence_share)
    what = "All tokens of each sequence are identical at the embedding"
    if tokens is not None and tokens > 1:
        what = f"The sequences have {tokens:.2g} different tokens each"
    sentence = (
        f"{what}: this batch cannot show rank collapse (at least {FEWEST} are needed, {VERDICT_SOURCE})."
    )
    return [Profile(first.copy(data=0.0), "the differences between the tokens are", sentence=sentence)]


def _equal_sequences(
    first: xr.DataArray, attrs: Mapping[str, Any], share: xr.DataArray | None
) -> list[Profile] | None:
    """A note where the tokens differ within the sequences, and are the same in all of them."""
    if share is None or distinct(attrs, "in_all") != distinct(attrs, "per_sequence"):
        return None
    if not float(share.sel(stream="mean").isel(depth=0)) < EQUAL:
        return None
    sentence = (
        "All sequences of this batch are the same: it cannot show whether the network tells them apart (at least two are "
        f"needed, {VERDICT_SOURCE})."
    )
    words = "the differences between the sequences are"
    return [Profile(first.copy(data=0.0), words, sentence=sentence)]


VERDICT_SOURCE = batch_without_differences.limits.source
