"""Do trained streams collapse onto one? Streams that start equal against streams whose symmetry is broken."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from depthscope.app.study.reproductions.claims import Claim
from depthscope.app.study.reproductions.measuring import train
from depthscope.app.study.reproductions.networks import make
from depthscope.app.study.reproductions.plan import Along, MeasuredCell, RunNumber, Scale, Study
from depthscope.app.study.reproductions.streams import BROKEN, NEAR_IDENTITY
from depthscope.app.study.small_lm import Size
from depthscope.diagnostics.schema import chain_dataset

FAMILIES = {"alike": "all alike", "broken": "symmetry broken", "hc": "HC of the package"}
STARTS = {"alike": 0.0, "broken": BROKEN}
STREAMS = Scale.streams

NUMBERS = (
    RunNumber(
        "identity_distance", "distance of H_res from the identity, mean", "identity_distance", {}, "mean"
    ),
    RunNumber(
        "composite_distance", "distance of the whole product from the identity", "composite_identity_distance"
    ),
    RunNumber("stream_cosine", "cosine between streams, last state", "stream_cosine"),
    RunNumber("effective_streams", "effective streams, mean over cuts", "effective_streams", {}, "mean"),
)
CURVES = (
    Along("cosine_along", "cosine between streams", "stream_cosine"),
    Along("identity_along", "distance of the product from the identity", "composite_identity_distance"),
)
SHARES = ("read_share", "signal_share", "write_share")
PAPER = "2606.03483"


def measure(settings: Mapping[str, Any]) -> MeasuredCell:
    """Train and measure one network.

    Returns: With the dominance of a stream, over depth and along it.
    """
    shares = tuple(Along(name, name, name) for name in SHARES)
    _, found = train(settings, NUMBERS, (*CURVES, *shares), build=_build)
    assert found.run is not None
    analysis = chain_dataset(found.run, "metrics")
    assert analysis is not None
    dominance = {
        "dominance": stream_mass(analysis, "read_share").sum(0),
        "signal_dominance": stream_mass(analysis, "signal_share").sum(0),
    }
    numbers = {name: float(np.max(mass / mass.sum())) for name, mass in dominance.items()}
    along = stream_mass(analysis, "read_share")
    curves = {name: line for name, line in found.curves.items() if name not in SHARES}
    curves["dominance_along"] = (along / along.sum(-1, keepdims=True)).max(-1).tolist()
    return replace(found, numbers={**found.numbers, **numbers}, curves=curves)


def _build(family: str, size: Size, seed: int) -> nn.Module:
    if family == "hc":
        return make(family, size, seed)
    # H_res is nearly the identity at the start, as where the collapse is described.
    return make("mhc-lite", size, seed, diagonal=NEAR_IDENTITY, broken=STARTS[family])


def stream_mass(analysis: xr.Dataset, read: str) -> np.ndarray:
    """Read share times write share of each stream at each connection: what it both gives and takes.

    ``read``: share in the weights, or in the signal that is read.
    """
    streams = [label for label in analysis["stream"].values.astype(object).astype(str) if label != "mean"]
    shares = [
        analysis[name].isel(step=-1).sel(stream=streams).transpose("connection", "stream").values
        for name in (read, "write_share")
    ]
    return np.nan_to_num(shares[0] * shares[1])


CLAIMS = (
    Claim(
        "Mixing stays near the identity",
        PAPER,
        "mean distance of H_res from it after training, over that at the start,",
        lambda networks: networks.paired(
            ("identity_distance", "alike"), ("start_identity_distance", "alike"), operator.truediv
        ),
        below=1.5,
    ),
    Claim(
        f"One of {STREAMS} streams that start alike comes to dominate reads and writes at {{depth}} layers",
        PAPER,
        f"largest share of read times write over depth, {1 / STREAMS:.2f} where all are equal,",
        lambda networks: networks.numbers("dominance", "alike"),
        above=2 / STREAMS,
    ),
    Claim(
        "It dominates the signal that is read",
        PAPER,
        "the same with the share of the signal",
        lambda networks: networks.numbers("signal_dominance", "alike"),
        above=2 / STREAMS,
    ),
    Claim(
        "Streams that start alike stay copies of one another",
        "this project",
        "cosine between streams at the last state",
        lambda networks: networks.numbers("stream_cosine", "alike"),
        above=0.99,
    ),
    Claim(
        "Breaking the symmetry at the start makes the streams differ",
        PAPER,
        "fall of the cosine between streams",
        lambda networks: networks.between("stream_cosine", "alike", "broken"),
        above=0.01,
    ),
    Claim(
        "Breaking the symmetry at the start lowers the dominance of one stream",
        PAPER,
        "fall of the largest share",
        lambda networks: networks.between("dominance", "alike", "broken"),
        above=0.05,
    ),
    Claim(
        "Breaking the symmetry at the start lowers the loss",
        PAPER,
        "fall of the held-out loss in nats per byte",
        lambda networks: networks.between("loss", "alike", "broken"),
        above=0.02,
    ),
)


STUDY = Study(
    name="stream-collapse",
    question="Do trained streams collapse onto one, and does breaking their symmetry at the start prevent it?",
    sources=(
        f"stream collapse and symmetry breaking, {PAPER}",
        "mHC-lite, 2601.05732",
        "Zhu et al. 2025, 2409.19606",
    ),
    families=FAMILIES,
    scale=Scale(depths=(4, 8), seeds=5, steps=60),
    quick=Scale(depths=(2,), seeds=1, width=16, steps=2, batch=2, length=16),
    measure=measure,
    numbers=(
        *NUMBERS,
        RunNumber("dominance", "largest share of read times write"),
        RunNumber("signal_dominance", "largest share of signal read times write"),
    ),
    curves=(*CURVES, Along("dominance_along", "largest share of read times write")),
    table=CLAIMS,
    limits=(
        f"The networks mix by mixtures of permutations whose diagonal starts at {NEAR_IDENTITY:g}. «All alike» starts "
        "every stream as a copy that is read and written with equal weights; «symmetry broken» draws the logits of "
        f"these weights from a normal distribution of spread {BROKEN:g}, which is this project's reading of breaking the "
        "symmetry, since its numbers are not known here. HC of the package breaks it by reading another stream in each "
        "connection. Whether a stream comes to dominate over many thousand steps is not tested."
    ),
)
