"""What does the connection change as networks get deeper? Six families, equal but for how states are joined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from depthscope.app.study.reproductions.claims import Claim, Networks, exponents
from depthscope.app.study.reproductions.measuring import train
from depthscope.app.study.reproductions.plan import Along, MeasuredCell, Row, RunNumber, Scale, Study

# Those with streams first: a line has its colour by its place, also where the others have no number.
FAMILIES = {
    "hc": "HC",
    "mhc": "mHC",
    "mhc-lite": "mHC-lite",
    "kromhc": "KromHC",
    "residual": "residual",
    "attnres": "attention residuals",
}
CONSTRAINED = ("mhc", "mhc-lite", "kromhc")

NUMBERS = (
    RunNumber(
        "gain_forward", "composite Amax gain, forward", "composite_gain", {"direction": "forward"}, "max"
    ),
    RunNumber(
        "gain_backward", "composite Amax gain, backward", "composite_gain", {"direction": "backward"}, "max"
    ),
    RunNumber(
        "violation", "column sums off by", "doubly_stochastic_violation", {"kind": "column"}, "max", log=True
    ),
    RunNumber("stream_differences", "stream differences left", "relative_deflated_gain", log=True),
    RunNumber("stream_cosine", "cosine between streams, last state", "stream_cosine"),
    RunNumber("rank", "effective rank, last state", "effective_rank"),
    RunNumber("similarity", "mean unbiased CKA between depths", "cka", {"estimator": "unbiased"}, "mean"),
    RunNumber(
        "gradient_largest", "largest gradient against the last state's", "backward_gain", {}, "max", log=True
    ),
    RunNumber("norm", "rms of the last state", "residual_norm", {}, "last", log=True),
    RunNumber("path_depth", "mean hops back, last connection", "effective_path_depth"),
    RunNumber(
        "elements_moved", "elements moved a token, all connections", "elements_moved", {}, "sum", log=True
    ),
)
CURVES = (
    Along("gain_along", "composite Amax gain, backward", "composite_gain", {"direction": "backward"}),
    Along("differences_along", "stream differences left", "relative_deflated_gain", log=True),
    Along("rank_along", "effective rank", "effective_rank"),
    Along("gradient_along", "gradient against the last state's", "backward_gain", log=True),
)

# Limits of ours: the papers print theirs for models a thousand times larger.
GAIN_GROWS, GAIN_STAYS, ALIKE, LOWER_LOSS, DEGENERATE, BOUNDED = 2.0, 1.6, 0.01, 0.02, 0.95, 0.25
HC_PAPER, MHC_PAPER, ATTNRES_PAPER = "Zhu et al. 2025, 2409.19606", "Xie et al., 2512.24880", "2603.15031"
LITE_PAPERS = "2601.05732 and 2601.21579"


def measure(settings: Mapping[str, Any]) -> MeasuredCell:
    """Train and measure one network."""
    return train(settings, NUMBERS, CURVES)[1]


def _furthest(row: Row) -> float:
    """How far the composite gain gets from 1 along a network, in orders of magnitude: 0.1 and 10 are equally far.

    Of the backward gain at every connection and the largest forward one; NaN where one is not positive.
    """
    gains = [*row.curves.get("gain_along", ()), row.numbers.get("gain_forward", math.nan)]
    return max(abs(math.log10(gain)) for gain in gains) if all(gain > 0 for gain in gains) else math.nan


def _moved(row: Row) -> float:
    plain = 3 * row.settings["width"] * 2 * row.settings["depth"]
    return float(row.numbers.get("elements_moved", math.nan)) / plain


def _source(family: str) -> str:
    return {"hc": HC_PAPER, "mhc": MHC_PAPER, "attnres": ATTNRES_PAPER}.get(family, LITE_PAPERS)


FURTHEST = "orders of magnitude between 1 and the composite Amax gain that is furthest from it"
CLAIMS = (
    Claim(
        "HC's composite gain leaves 1 at {depth} layers, upwards or downwards",
        MHC_PAPER,
        FURTHEST,
        lambda networks: [_furthest(row) for row in networks.at_depth("hc")],
        above=math.log10(GAIN_GROWS),
    ),
    Claim(
        "HC's composite gain grows above 1 at {depth} layers",
        MHC_PAPER,
        "largest composite Amax gain, forward or backward,",
        lambda networks: networks.paired(("gain_forward", "hc"), ("gain_backward", "hc"), max),
        above=GAIN_GROWS,
    ),
    *(
        Claim(
            f"{FAMILIES[family]}'s composite gain stays near 1 at {{depth}} layers",
            _source(family),
            FURTHEST,
            lambda networks, family=family: [_furthest(row) for row in networks.at_depth(family)],
            below=math.log10(GAIN_STAYS),
        )
        for family in CONSTRAINED
    ),
    *(
        Claim(
            f"{FAMILIES[family]} is doubly stochastic to rounding, without Sinkhorn's steps",
            LITE_PAPERS,
            "largest error of a column sum",
            partial(Networks.numbers, name="violation", family=family),
            below=1e-5,
        )
        for family in ("mhc-lite", "kromhc")
    ),
    *(
        Claim(
            f"A gain of 1 hides that {FAMILIES[family]}'s mixing makes all streams alike",
            "this project",
            "share of the differences left",
            partial(Networks.numbers, name="stream_differences", family=family),
            below=ALIKE,
        )
        for family in CONSTRAINED
    ),
    *(
        Claim(
            f"{FAMILIES[family]}: the loss is below that of a plain residual network at {{depth}} layers",
            _source(family),
            "held-out loss below the residual one's, in nats per byte,",
            partial(Networks.between, name="loss", one="residual", other=family),
            above=LOWER_LOSS,
        )
        for family in (*CONSTRAINED, "hc", "attnres")
    ),
    Claim(
        "A plain residual network holds nearly one representation at {depth} layers",
        HC_PAPER,
        "mean unbiased CKA between depths",
        lambda networks: networks.numbers("similarity", "residual"),
        above=DEGENERATE,
    ),
    Claim(
        "HC's layers differ more from each other than those of a plain residual network",
        HC_PAPER,
        "mean unbiased CKA of the residual network less HC's",
        lambda networks: networks.between("similarity", "residual", "hc"),
        above=0.02,
    ),
    Claim(
        "Attention residuals keep the size of what is read at any depth",
        ATTNRES_PAPER,
        "power of the depth with which the last state's rms grows",
        lambda networks: exponents(networks.rows, "norm", "attnres"),
        below=BOUNDED,
    ),
    Claim(
        "Four streams move more than five times the elements of a plain residual connection",
        f"{MHC_PAPER}, Table 2",
        "elements moved by HC over 3 d a connection",
        lambda networks: [_moved(row) for row in networks.rows if row.settings["family"] == "hc"],
        above=5.0,
        exact=True,
    ),
)


STUDY = Study(
    name="connections",
    question="What does the connection change as networks get deeper?",
    sources=(HC_PAPER, MHC_PAPER, "mHC-lite, 2601.05732", "KromHC, 2601.21579", ATTNRES_PAPER),
    families=FAMILIES,
    scale=Scale(depths=(2, 4, 8), seeds=5),
    quick=Scale(depths=(2, 3), seeds=1, width=16, steps=2, batch=2, length=16),
    measure=measure,
    numbers=NUMBERS,
    curves=CURVES,
    table=CLAIMS,
    limits=(
        "HC and mHC are the hyper-connections package's, whose HC starts at the identity and whose mHC starts at a "
        "diagonal of 0.475; mHC-lite, KromHC and attention residuals are written here after their equations, the two "
        "mixings from the same diagonal, and without their papers' kernels. The gains that the mHC paper prints are of "
        "models of 27 billion parameters: no gain of these networks says that theirs are wrong, or right."
    ),
)
