"""Does what leaves a block still depend on what came in? On the token, on the sequence, and on nothing that comes later.

Limits without a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.age import knows_frequencies_alone, number_or_none, task_of
from depthscope.diagnostics.verdicts.causes import from_there_on, overlapping
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, verdict
from depthscope.diagnostics.verdicts.references import EQUAL, FEWEST, distinct
from depthscope.diagnostics.verdicts.wiring import told

# Sequences of random tokens have a share near 1; those of one language, whose positions say little, above 0.5.
SHARED_INPUT = 0.01
WORDS = "the share of the states' variance between sequences is"


# A block that does nothing is no failure of the network, unless the loss says so.
@verdict(
    metric="step_spread",
    judges=Number(
        "share of what a step adds that depends on the token", "‖added − mean added‖² / ‖added‖²", "0 to 1"
    ),
    limits=Limits(warn=1e-3, above=False),
    follows_from={
        "rank_collapse": from_there_on,
        "dead_state": from_there_on,
        "equal_sequences": from_there_on,
        "common_vector": overlapping,
    },
    drawn_on=("step_spread",),
)
def constant_branch(
    step_spread: xr.DataArray,
    attrs: Mapping[str, Any],
    num_tokens: xr.DataArray | None = None,
    token_cosine: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """A block adds the same vector to every token: it computes nothing.

    Look for weights that are zero where a bias is not, for a norm whose gain is zero, or for a nonlinearity that no token
    passes.
    """
    tokens = distinct(attrs, "in_all")
    if tokens is None and num_tokens is not None:
        tokens = float(num_tokens.sel(scope="data", tokens="all").max())
    if (tokens is None or tokens >= FEWEST) and not _is_one_token(token_cosine):
        # Of a network whose answer is as good as a constant one the blocks have nothing to tell the tokens apart for.
        task = task_of(attrs)
        yield Profile(
            step_spread.sel(stream="mean", drop=True),
            "the share of what the step adds that depends on the token is",
            metric="step_spread",
            note_only=knows_frequencies_alone(task, number_or_none(task.get("loss"))),
        )


def _is_one_token(cosine: xr.DataArray | None) -> bool:
    """Whether all tokens of the data are the same at the embedding."""
    if cosine is None or "raw" not in cosine["centering"].values:
        return False
    first = cosine.sel(scope="data", tokens="all", centering="raw", stream="mean", drop=True).isel(depth=0)
    return 1.0 - float(first) < EQUAL


@verdict(
    metric="sequence_share",
    judges=Number(
        "share of the variance of the states that is between sequences at the same position",
        "mean_t Var_s(u) / Var(u), u = x / ‖x‖",
        "0 to 1",
    ),
    limits=Limits(warn=1e-4, fail=1e-8, above=False),
    follows_from={"rank_collapse": from_there_on, "dead_state": from_there_on, "common_vector": overlapping},
)
def equal_sequences(sequence_share: xr.DataArray, attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """All sequences have the same states: the network no longer sees its input.

    Look in that block for a mean over the batch, a row that is taken for all, or a mask that leaves only the position.
    """
    share = sequence_share.sel(stream="mean", drop=True)
    each, of_all = distinct(attrs, "per_sequence"), distinct(attrs, "in_all")
    if each is not None and of_all is not None and of_all > each:  # the sequences have different tokens
        yield Profile(share, WORDS, begins=True)
    # Of equal sequences nothing else can be expected.
    elif float(share.isel(depth=0)) > SHARED_INPUT:
        later = xr.DataArray(np.arange(share.sizes["depth"]) > 0, dims="depth")
        yield Profile(share.where(later), WORDS, begins=True)


@verdict(
    metric="gradient_norm",
    judges=Number(
        "share of an output's gradient, or of its change, that comes from later tokens", range="0 to 1"
    ),
    limits=Limits(fail=1e-3),
)
def looks_ahead(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The network sees the tokens that it has to predict.

    Check the causal mask on the path that runs: a fast path may mask where a slow one (dropout, a bias, a cache) does not.
    """
    yield from told(attrs, "looks_ahead")
