"""What does a stream carry? It is removed at one depth, and put back at later ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from depthscope.app.study.reproductions.claims import Claim, Networks
from depthscope.app.study.reproductions.measuring import measured_batch, train
from depthscope.app.study.reproductions.networks import make
from depthscope.app.study.reproductions.plan import Along, MeasuredCell, RunNumber, Scale, Study
from depthscope.app.study.reproductions.streams import BROKEN, NEAR_IDENTITY
from depthscope.app.study.small_lm import Size
from depthscope.probes.interventions import ablate, plan

FAMILIES = {"hc": "HC", "mhc": "mHC", "broken": "mHC-lite near the identity, symmetry broken"}
SHORT = {"hc": "HC", "mhc": "mHC", "broken": "mHC-lite"}

TRAINED = (
    RunNumber("stream_cosine", "cosine between streams, last state", "stream_cosine"),
    RunNumber("effective_streams", "effective streams, mean over cuts", "effective_streams", {}, "mean"),
)
RESCUES = (
    RunNumber("removed", "loss by removing a stream, nats per byte"),
    RunNumber("removed_worst", "loss by removing the worst stream, nats per byte"),
    RunNumber("restored_next", "restored when put back at the next state"),
    RunNumber("restored_half", "restored when put back half-way"),
    RunNumber("restored_last", "restored when put back at the last state"),
)
CURVES = (
    Along("removed_along", "loss by removing a stream at this depth", log=True),
    Along("restored_along", "share restored when put back at this depth"),
)
PAPER = "2603.14833"
# A mean rise of the loss below this, in nats per byte, is no stream that is missed, and a share of it would be noise.
MISSED = 0.01


def measure(settings: Mapping[str, Any]) -> MeasuredCell:
    """Train one network, then remove each stream at each depth and put it back.

    Returns: With the loss by removing a stream, by depth, and the share of it that putting it back restores.
    """
    model, found = train(settings, TRAINED, (), build=_build)
    last = 2 * settings["depth"]
    # A quarter of the way: enough has been written that a stream can be missed, and enough follows.
    early = max(1, last // 4)
    removed = _removed(model, settings, sorted({0, early, last // 2, 3 * last // 4, last}))
    later = {"next": early + 1, "half": (early + last) // 2, "last": last}
    restored = _restored(model, settings, early, sorted({depth for depth in later.values() if depth > early}))
    numbers = {
        "removed": float(removed[early].mean()),
        "removed_worst": float(removed[early].max()),
        **{f"restored_{name}": float(restored[depth]) for name, depth in later.items()},
    }
    curves = {"removed_along": removed.mean(-1).tolist(), "restored_along": restored.tolist()}
    return replace(found, numbers={**found.numbers, **numbers}, curves=curves)


def _build(family: str, size: Size, seed: int) -> nn.Module:
    if family == "broken":
        return make("mhc-lite", size, seed, diagonal=NEAR_IDENTITY, broken=BROKEN)
    return make(family, size, seed)


def _removed(model: nn.Module, settings: Mapping[str, Any], depths: Sequence[int]) -> np.ndarray:
    """Change of the loss by setting a stream to zero, (all depths, streams); NaN where none was."""
    effects = ablate(model, measured_batch(settings), plan("drop_stream", depths=depths))
    table = np.full((2 * settings["depth"] + 1, settings["streams"]), math.nan)
    table[effects["depth"].values, effects["stream"].values] = effects["loss_change"].values
    return table


def _restored(model: nn.Module, settings: Mapping[str, Any], early: int, later: Sequence[int]) -> np.ndarray:
    """Share of the loss that returns where each stream, removed at a depth, is put back at each later one.

    Losses are added up over the streams before they are divided: the share of a stream that costs nothing is noise.
    """
    effects = ablate(model, measured_batch(settings), plan("rescue", depths=[early, *later]))
    kind = effects["kind"].values.astype(object).astype(str)
    cost = effects["loss_change"].values
    removed = cost[kind == "drop_stream"]
    shares = np.full(2 * settings["depth"] + 1, math.nan)
    if removed.mean() > MISSED:
        for depth in later:
            left = cost[(kind == "rescue") & (effects["depth"].values == depth)]
            shares[depth] = 1 - left.sum() / removed.sum()
    return shares


CLAIMS = (
    *(
        claim
        for family, title in SHORT.items()
        for claim in (
            Claim(
                f"{title}: a network of {{depth}} layers misses a stream that is removed at a quarter of the way",
                PAPER,
                "rise of the loss in nats per byte, mean of the streams,",
                partial(Networks.numbers, name="removed", family=family),
                above=MISSED,
            ),
            Claim(
                f"{title}: the other streams keep enough that it is restored when the stream comes back at the end",
                PAPER,
                "share of the loss that is restored",
                partial(Networks.numbers, name="restored_last", family=family),
                above=0.5,
            ),
            Claim(
                f"{title}: the later it comes back, the less is restored",
                PAPER,
                "share restored at the next state less that at the last one",
                partial(Networks.paired, one=("restored_next", family), other=("restored_last", family)),
                above=0.1,
            ),
        )
    ),
    Claim(
        "mHC, which mixes its streams, misses one of them less than HC does",
        "this project",
        "rise of the loss in HC less that in mHC, in nats per byte,",
        lambda networks: networks.between("removed", "hc", "mhc"),
        above=0.01,
    ),
)


STUDY = Study(
    name="rescue",
    question="What does a stream carry that the others do not, and for how long?",
    sources=(f"ablate and rescue, {PAPER}", "Zhu et al. 2025, 2409.19606", "Xie et al., 2512.24880"),
    families=FAMILIES,
    scale=Scale(depths=(4,), seeds=5, steps=400),
    quick=Scale(depths=(2,), seeds=1, width=16, steps=2, batch=2, length=16),
    measure=measure,
    numbers=(*TRAINED, *RESCUES),
    curves=CURVES,
    table=CLAIMS,
    limits=(
        "Streams that are copies of one another, as HC's and mHC's are at the start, cannot be missed: a removed one "
        "leaves the direction of what is read as it was. The third family starts with streams that differ. A stream is "
        "set to zero in every token and put back as it was in the unchanged forward; what it did to the others in "
        "between stays done. Other ways to remove one, such as its mean over tokens, are not tested, and the paper's "
        "models and numbers are not compared."
    ),
)
