"""What do skips and norms decide before the first step, and after some? No skip, Post-LN, Pre-LN, LayerNorm scaling."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from depthscope.app.study.reproductions.claims import Claim, Networks, exponents
from depthscope.app.study.reproductions.measuring import measured_batch, train
from depthscope.app.study.reproductions.plan import Along, MeasuredCell, RunNumber, Scale, Study
from depthscope.probes.interventions import ablate

FAMILIES = {"no-skip": "no skip", "post-ln": "Post-LN", "pre-ln": "Pre-LN", "ln-scaling": "LayerNorm scaling"}

NUMBERS = (
    RunNumber("norm", "rms of the last state", "residual_norm", {}, "last", log=True),
    # By it the law of fresh Pre-LN knows whether branches are independent.
    RunNumber("cosine", "cosine of the last state with the one before", "adjacent_cosine"),
    RunNumber("dong", "Dong residual, last state", "dong_residual", {}, "last", log=True),
    RunNumber("rank", "effective rank, last state", "effective_rank"),
    RunNumber(
        "gradient_first",
        "gradient at the embedding against the last state's",
        "backward_gain",
        {},
        "first",
        log=True,
    ),
    RunNumber("turn", "smallest turn against independent branches", "relative_turn", {}, "min"),
    RunNumber("effective_depth", "effective depth, in steps", "effective_depth"),
    RunNumber(
        "growth", "growth of the state beyond independent branches", "variance_growth", {}, "max", log=True
    ),
)
CURVES = (
    Along(
        "norm_start", "norm of the state, fresh", "residual_norm", start=True, law="pre_ln_growth", log=True
    ),
    Along("norm_along", "norm of the state, trained", "residual_norm", log=True),
    Along("dong_start", "Dong residual, fresh", "dong_residual", start=True, log=True),
    Along(
        "turn_along",
        "turn against independent branches, trained",
        "relative_turn",
        law="independent_branches",
    ),
    Along(
        "gradient_start", "gradient against the last state's, fresh", "backward_gain", start=True, log=True
    ),
)

# Nats a byte: what costs less than this counts as this.
LEAST = 1e-4
DONG, XIONG, SUN = (
    "Dong et al. 2021, 2103.03404",
    "Xiong et al. 2020, 2002.04745",
    "Sun et al. 2025, 2502.05795",
)


def measure(settings: Mapping[str, Any]) -> MeasuredCell:
    """Train and measure one network."""
    model, found = train(settings, NUMBERS, CURVES)
    return replace(found, numbers={**found.numbers, **_skipped(model, settings)})


def _skipped(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, float]:
    """What skipping one block costs, mean over the blocks of each half, in nats per byte; nothing costs less than nothing."""
    effects = ablate(model, measured_batch(settings), "skip")
    cost = np.maximum(effects["loss_change"].values, 0)
    half = settings["depth"] // 2
    earlier, later = cost[effects["block"].values < half], cost[effects["block"].values >= half]
    return {
        "skip_earlier": float(earlier.mean()) if earlier.size else math.nan,
        "skip_later": float(later.mean()) if later.size else math.nan,
    }


def orders_apart(one: float, other: float) -> float:
    """How many powers of ten lie between two positive numbers; NaN where one is not positive.

    ``one, other``: such as 100 and 1, which are 2 apart.
    """
    return math.log10(one / other) if one > 0 and other > 0 else math.nan


def _growth(networks: Networks, family: str) -> list[float]:
    """The power of the depth with which grows what the blocks add to the squared norm of the embedding."""
    rows = []
    for row in networks.rows:
        norms = row.curves.get("norm_start", ())
        rows.append(replace(row, numbers={"added": norms[-1] ** 2 - norms[0] ** 2 if norms else math.nan}))
    return exponents(rows, "added", family)


def _later_share(networks: Networks, family: str) -> list[float]:
    """Powers of ten between what skipping a later and an earlier block costs, for each seed."""
    return networks.paired(
        ("skip_later", family),
        ("skip_earlier", family),
        lambda later, earlier: orders_apart(max(later, LEAST), max(earlier, LEAST)),
    )


CLAIMS = (
    Claim(
        "Without skips the tokens of a fresh network become equal over {depth} layers",
        DONG,
        "Dong residual of the last state",
        lambda networks: networks.numbers("start_dong", "no-skip"),
        below=0.1,
    ),
    Claim(
        "Skips prevent it",
        DONG,
        "orders of magnitude between the Dong residuals of fresh Pre-LN and without skips",
        lambda networks: networks.paired(("start_dong", "pre-ln"), ("start_dong", "no-skip"), orders_apart),
        above=1.0,
    ),
    Claim(
        "The squared norm of the state of fresh Pre-LN networks grows linearly with the depth",
        XIONG,
        "power of the depth with which what is added to the embedding's grows",
        lambda networks: _growth(networks, "pre-ln"),
        above=0.8,
        below=1.2,
    ),
    Claim(
        "LayerNorm scaling slows this growth",
        SUN,
        "the same power",
        lambda networks: _growth(networks, "ln-scaling"),
        below=0.8,
    ),
    Claim(
        "The state of Post-LN networks does not grow",
        XIONG,
        "power of the depth with which its norm at the end grows",
        lambda networks: exponents(networks.rows, "start_norm", "post-ln"),
        above=-0.05,
        below=0.05,
    ),
    Claim(
        "Fresh Post-LN spreads its gradients less evenly over {depth} layers than Pre-LN",
        XIONG,
        "orders of magnitude between Pre-LN's and Post-LN's gradient at the embedding, each against its last state's,",
        lambda networks: networks.paired(
            ("start_gradient_first", "pre-ln"), ("start_gradient_first", "post-ln"), orders_apart
        ),
        above=1.0,
    ),
    Claim(
        "The curse of depth: some block of trained Pre-LN hardly turns the state at {depth} layers",
        SUN,
        "smallest turn against independent branches",
        lambda networks: networks.numbers("turn", "pre-ln"),
        below=0.2,
    ),
    Claim(
        "The later half of the blocks of trained Pre-LN matters less than the earlier one",
        SUN,
        "orders of magnitude between what skipping a later and an earlier block costs",
        lambda networks: _later_share(networks, "pre-ln"),
        below=-0.3,
    ),
    Claim(
        "LayerNorm scaling makes the later half matter more",
        SUN,
        "the same with scaling less that of Pre-LN",
        lambda networks: list(
            map(operator.sub, _later_share(networks, "ln-scaling"), _later_share(networks, "pre-ln"))
        ),
        above=0.1,
    ),
    Claim(
        "LayerNorm scaling learns better than Pre-LN at {depth} layers",
        SUN,
        "held-out loss of Pre-LN less that with scaling, in nats per byte,",
        lambda networks: networks.between("loss", "pre-ln", "ln-scaling"),
        above=0.02,
    ),
)


STUDY = Study(
    name="initialisation",
    question="What do skips and norms decide, before the first step and after some?",
    sources=(DONG, XIONG, SUN),
    families=FAMILIES,
    scale=Scale(depths=(4, 8, 16), seeds=5, steps=60),
    quick=Scale(depths=(2, 3), seeds=1, width=16, steps=2, batch=2, length=16),
    measure=measure,
    numbers=NUMBERS,
    curves=CURVES,
    table=CLAIMS,
    limits=(
        "All weights have variance 1/fan-in: GPT-2's division of the written weights by the root of the depth would be "
        "a cure of its own. The curse of depth was described in trained models of billions of parameters; some dozens "
        "of steps show how it begins, not where it ends. Dong's bound is of attention alone, and these networks have "
        "MLPs."
    ),
)
