"""Do tokens stay different, dimensions in use, and every layer active? Verdicts on the states.

Limits without a comment or a source are heuristics of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics.numbers import percent
from depthscope.diagnostics.verdicts.age import FEW_TOKENS, FEWEST, Inputs, Task
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, number, verdict
from depthscope.diagnostics.verdicts.rule import Kind

# Angle, as a share of π, below which a layer counts as doing nothing: 1.8°. Gromov et al. and Men et al. remove the
# layers with the smallest angles of a trained model, and give no limit. Heuristic.
IDLE = 0.01
# What a step turns the states by where it adds nothing: the rounding of a cosine in float64, and no trained block.
DEAD = 1e-6


# A Dong residual that rounding leaves of equal tokens.
EQUAL = 1e-5


def _below_input(values: xr.DataArray, tokens: float | None) -> xr.DataArray | None:
    """Differences between tokens, 1 where they are as large as can be, relative to what came in; None where nothing did.

    Where the tokens are known to differ, a first state without differences is the network's own, and is judged as it is.
    """
    first = float(values.isel(depth=0))
    if tokens is not None:
        return values if tokens >= FEWEST else None
    if math.isnan(first):
        return values
    if first < EQUAL:
        return None
    after = values / min(first, 1.0)
    return after.where(after["depth"] != after["depth"][0]) if "depth" in after.coords else after


# A Dong residual of 0.15 and a share of 0.05: for 64 tokens of 64 features, whose noise has an effective rank of 52, one of
# 3.5. Attention without skips loses its rank before its Dong residual. Heuristic.
RESIDUAL_OF_SHARE = 3.0


# Where a sequence has one answer, its tokens are averaged in the end, and a fifth of the differences is enough before: 0.1 is
# what networks of two classes have left that have solved their task.
OF_ONE_ANSWER = 5.0


@verdict(
    Kind.FRESH,
    metric="effective_rank",
    judges="share left of the differences between the tokens of a sequence (times 5 where it has one answer)",
    formula="max(Dong residual, 3 (erank − 1) / (erank of noise − 1)), raw, within a sequence",
    range="0 to about 3",
    limits=Limits(warn=0.15, fail=0.03, above=False),
)
def rank_collapse(
    effective_rank: xr.DataArray,
    effective_rank_null: xr.DataArray,
    dong_residual: xr.DataArray,
    inputs: Inputs,
    task: Task,
) -> Iterator[Profile]:
    """The tokens of a sequence become equal.

    Keep the skip path at full strength, lower attention's share against the MLP's, or warm up longer:
    attention alone loses rank doubly exponentially with depth (Dong et al. 2021).
    """
    pick = {"scope": "sequence", "tokens": "ordinary", "centering": "raw"}
    rank, null = (
        effective_rank.sel(pick | {"stream": "mean"}, drop=True),
        effective_rank_null.sel(pick, drop=True),
    )
    # As a share of what noise has, both counted from the smallest possible rank of 1.
    share = RESIDUAL_OF_SHARE * (rank - 1.0) / (null - 1.0).where(null > 1.0)
    residual = dong_residual.sel(tokens="ordinary", stream="mean", drop=True)
    # Both must be low: a common mean alone lowers the effective rank, a single large feature the Dong residual.
    both = xr.where(residual > share, residual, share, keep_attrs=False).assign_coords(rank.coords)
    judged = _below_input(both.where(share.notnull()), inputs.per_sequence)
    if judged is None or judged.isnull().all():
        return
    at, one = int(np.nanargmin(judged.values)), task.targets_per_sequence == 1
    left = float(residual[at])
    note = (
        f"Tokens of a sequence are {percent(1 - left)} equal there (Dong residual {number(left)}; effective rank "
        f"{number(float(rank[at]))} where noise has {number(float(null))})."
    )
    yield Profile(
        OF_ONE_ANSWER * judged if one else judged,
        template=""
        if one
        else "{percent} of the differences between the tokens of a sequence are left {where}",
        note=note + _directions(effective_rank, effective_rank_null),
    )


def _directions(rank: xr.DataArray, null: xr.DataArray) -> str:
    """How many directions all tokens together use where they use the fewest."""
    pick = {"scope": "data", "tokens": "ordinary", "centering": "centred"}
    pooled = rank.sel(pick | {"stream": "mean"}, drop=True)
    if pooled.isnull().all():
        return ""
    at = int(np.nanargmin(pooled.values))
    return (
        f" Over all data the states use {number(float(pooled[at]))} directions at depth {at}, where noise of that size has "
        f"{number(float(null.sel(pick)))}."
    )


# A space of fewer directions has none to lose. Heuristic.
FEW_DIRECTIONS = 3.0


# What a block leaves out of a sum that passes everything on is not lost: in networks that are trained the rank hardly falls.
@verdict(
    Kind.FRESH,
    metric="numerical_rank",
    judges="number of directions in use over the most that an earlier state uses",
    formula="numerical rank at l / max over earlier",
    limits=Limits(warn=0.6, above=False),
    follows_from=("rank_collapse", "common_vector"),
)
def lost_directions(numerical_rank: xr.DataArray) -> Iterator[Profile]:
    """A block loses directions of the state, which no later block can restore.

    Look in that block for a projection, features that are dropped or set to zero, units that no token passes, or a bottleneck
    without a skip.
    """
    rank = numerical_rank.sel(scope="data", tokens="ordinary", centering="centred", stream="mean", drop=True)
    most = np.fmax.accumulate(rank.values)
    yield Profile(
        rank / np.where(most > 2.0 * FEW_DIRECTIONS, most, np.nan),
        note=f"The most are {number(float(np.nanmax(most)))}." if np.isfinite(most).any() else "",
    )


MOST_ALIKE = 0.98


# Two tokens with a cosine of 0.98 have an angle of 11°, with one of 0.995 of 6°. States after a ReLU, whose numbers are all
# positive, have cosines up to 0.97 in a fresh ResNet.
@verdict(
    Kind.FRESH,
    metric="token_cosine",
    judges="mean cosine between any two tokens of the data",
    formula="mean over pairs of cos(x_i, x_j), raw",
    range="−1 to 1",
    limits=Limits(warn=MOST_ALIKE, fail=0.995, scale="cosine"),
    follows_from=("rank_collapse",),
)
def common_vector(
    token_cosine: xr.DataArray, inputs: Inputs, num_tokens: xr.DataArray | None = None
) -> Iterator[Profile]:
    """All tokens share one large vector, and hardly differ otherwise.

    A norm then sees little else, and cosines between tokens mean nothing before it is removed. Look for a bias that grows with
    the depth, or an embedding with a large mean; remove the mean of the tokens, or decay that bias.
    """
    # Training curves know neither which tokens are massive nor the mean of all.
    if not {"ordinary", "centred"} <= {*token_cosine["tokens"].values, *token_cosine["centering"].values}:
        return
    raw, centred = (
        token_cosine.sel(scope="data", tokens="ordinary", centering=centering, stream="mean", drop=True)
        for centering in ("raw", "centred")
    )
    if inputs.are_few or _below_input(1.0 - raw, inputs.in_all) is None:
        return
    if inputs.in_all is None:  # then what the first states share may have come in
        raw = raw.where(raw["depth"] != raw["depth"][0]) if float(raw[0]) > MOST_ALIKE else raw
    at = int(np.nanargmax(raw.values)) if raw.notnull().any() else 0
    note = f"Without their common mean it is {number(float(centred[at]))}."
    tokens = np.inf if num_tokens is None else float(num_tokens.sel(scope="data", tokens="ordinary").max())
    yield Profile(raw, metric="token_cosine", note=note, note_only=tokens < FEW_TOKENS)


@verdict(
    Kind.LOSS,
    metric="angular_distance",
    judges="angle by which a layer turns the states, as a share of a half turn",
    formula="arccos cos(x_{l−1}, x_l) / π, mean over tokens",
    range="0 to 1",
    limits=Limits(info=IDLE, warn=DEAD, above=False),
    follows_from=("gain_explosion", "same_representation", "common_vector"),
)
def idle_layer(
    angular_distance: xr.DataArray, block_influence: xr.DataArray, write_share: xr.DataArray | None = None
) -> Iterator[Profile]:
    """A layer barely changes the residual stream.

    It can be left out at little cost (Gromov et al. 2025; Men et al. 2025). Normal at the start where
    branches begin at zero; after training, raise its branch's scale or learning rate, or take fewer layers.
    """
    steps = block_influence.sel(tokens="ordinary", drop=True)
    table = angular_distance.sel(tokens="ordinary", drop=True).transpose("depth", "other_depth")
    angles = np.full(steps.sizes["depth"], np.nan)
    angles[1:] = np.diagonal(table.values, offset=-1)
    # A final norm is no layer, and neither is a change between two blocks. NaN steps, as at the embedding, are none.
    layers = steps.notnull()
    if "site" in steps.coords:
        layers &= ~steps["site"].isin(["final", "pre"])
    turned = steps.copy(data=angles).where(layers)
    if write_share is not None and "depth_out" in write_share.coords:
        # Mixing alone may turn the state: of weights that are all zero no stream has a share.
        silent = write_share.isnull().all("stream")
        written = write_share["depth_out"].where(silent & ~silent.all(), drop=True)
        turned = turned.where(~((turned < IDLE) & turned["depth"].isin(written)), 0.0)
    # Where most of the steps add nothing, their branches were made to begin so.
    most_are_dead = int((turned < DEAD).sum()) > int(turned.notnull().sum()) // 2
    yield Profile(
        turned,
        template="the step {where} barely changes the residual stream: it turns it by {percent} of a half turn",
        note_only=most_are_dead,
    )


# What is massive is defined by Sun et al. 2024, who find it on one or two tokens a sequence. That more than 5 % of the tokens
# are too many is ours; of short sequences one or two are more than that.
SINKS = 2


@verdict(
    Kind.FRESH,
    metric="massive_token_fraction",
    judges="share of the tokens with a massive activation",
    formula="|a| > 100 and |a| > 1000 median |a|",
    range="0 to 1",
    limits=Limits(info=0.0, warn=0.05),
)
def massive_activations(
    massive_token_fraction: xr.DataArray, massive_activation: xr.DataArray
) -> Iterator[Profile]:
    """Some tokens have massive activations.

    Normal in trained transformers, on one or two tokens a sequence: read ranks and similarities without
    these tokens (tokens = ordinary). Elsewhere look for a feature that the norm does not see.
    """
    share, attrs = massive_token_fraction.max("stream"), massive_token_fraction.attrs
    if share.isnull().all():
        return
    # The ratio of the depth that the sentence tells, which is where most tokens have one.
    largest = float(massive_activation.isel(depth=int(np.nanargmax(share.values))).max())
    features = ", ".join(map(str, attrs.get("massive_features", [])))
    positions = ", ".join(map(str, sorted({int(token) for _, token in attrs.get("massive_tokens", [])})))
    named = {"features": features, "positions": positions}
    where = "; ".join(f"{name} {numbers}" for name, numbers in named.items() if numbers)
    per_sequence = float(share.max()) * float(attrs.get("tokens_per_sequence", np.nan))
    note = f"The largest there is {number(largest)} times the median{f' ({where})' if where else ''}."
    note += f" It is {number(per_sequence)} a sequence." if per_sequence == per_sequence else ""
    yield Profile(share, note=note, note_only=per_sequence <= SINKS)


# The 30 layers of SmolLM2-135M have at least 0.41, where single heads are near 0. A layer whose
# queries and keys are 60 × too large has at most 0.015.
@verdict(
    Kind.FRESH,
    metric="attention_entropy",
    judges="largest entropy of attention over the heads of a layer, as a share of uniform attention",
    formula="max over heads of H / ln(number of keys)",
    range="0 to 1",
    limits=Limits(warn=0.1, above=False),
)
def attention_entropy_collapse(attention_entropy: xr.DataArray) -> Iterator[Profile]:
    """Attention entropy collapse: in every head each query attends to a single token.

    Normalise queries and keys before their product, cap the logits, or lower the learning rate or the scale of the query and
    key weights: a softmax that is saturated passes no gradient to them.
    """
    # The head that spreads most: heads that copy the token before, or rest on a sink, are common in trained models.
    yield Profile(attention_entropy.max("head"), begins=True)


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
def equal_sequences(sequence_share: xr.DataArray, inputs: Inputs) -> Iterator[Profile]:
    """All sequences have the same states: the network no longer sees its input.

    Look in that block for a mean over the batch, a row that is taken for all, or a mask that leaves only the position.
    """
    share = sequence_share.sel(stream="mean", drop=True)
    if (inputs.in_all or 0.0) > (inputs.per_sequence or math.inf):  # the sequences have different tokens
        yield Profile(share, begins=True)
    # Of equal sequences nothing else can be expected.
    elif float(share.isel(depth=0)) > SHARED_INPUT:
        later = xr.DataArray(np.arange(share.sizes["depth"]) > 0, dims="depth")
        yield Profile(share.where(later), begins=True)
