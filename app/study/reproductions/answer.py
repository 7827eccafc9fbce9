"""Does the signal degenerate into one representation that is the same in all layers? Five designs of one size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from depthscope.app.study.learner import held_out_loss
from depthscope.app.study.reproductions.claims import Claim, Networks
from depthscope.app.study.reproductions.measuring import analysed, corpus, fresh
from depthscope.app.study.reproductions.networks import DepthAttentionLM, make, scale_branches
from depthscope.app.study.reproductions.plan import Along, MeasuredCell, RunNumber, Scale, Study
from depthscope.app.study.reproductions.weights import trained_once
from depthscope.app.study.small_lm import Size
from depthscope.diagnostics import judge
from depthscope.diagnostics.verdicts.same_representation import ALIKE, longest_range

FAMILIES = {"residual": "residual", "hc": "HC", "mhc": "mHC", "mhc-lite": "mHC-lite", "attnres": "AttnRes"}
SHORT, LONG = 1000, 4000
DOSES = (0.1, 0.01, 0.001)
MAIN = {"steps": SHORT, "branch_scale": 1.0}

# By the word in a row: the same two states compared in several ways. Of these the least decides, as in the verdict.
VIEWS = {
    "mean": ("cka", "mean over streams"),
    "joined": ("joined_cka", "all streams joined"),
    "stream": ("least_stream_cka", "least similar stream"),
    "trimmed": ("trimmed_cka", "without large features"),
}
FURTHER = {"whitened": ("whitened_cka", "whitened"), "cknna": ("cknna", "CKNNA")}
METRICS = (
    *(metric for metric, _ in (*VIEWS.values(), *FURTHER.values())),
    "angular_distance",
    "num_tokens",
)
# Windows of the held-out text on which networks without some of their blocks are compared with all of them.
WINDOWS = 16

NUMBERS = (
    RunNumber("alike", "CKA of first and last state, the least of four views"),
    *(
        RunNumber(f"alike_{name}", f"CKA of first and last state, {title}")
        for name, (_, title) in VIEWS.items()
    ),
    RunNumber("alike_whitened", "the same of whitened states"),
    RunNumber("alike_cknna", "CKNNA of first and last state"),
    RunNumber("start_alike", "CKA of first and last state before training"),
    RunNumber("same_from", "block from which all states are the same"),
    RunNumber("longest_same", "longest range of blocks whose states are the same"),
    RunNumber("turn", "angle between first and last state, degrees"),
    RunNumber("severity", "severity of the verdict same_representation"),
    RunNumber("skip_later", "loss by leaving out the later half of the blocks, nats per byte"),
    RunNumber("skip_same", "loss by leaving out the longest range, nats per byte"),
    RunNumber("kept_bytes", "bytes saved for the backward of a token"),
    RunNumber("seconds", "processor seconds"),
)
CURVES = (
    Along("to_last", "CKA with the last state, the least of four views"),
    Along("start_to_last", "CKA with the last state, before training"),
)
HC_PAPER, MHC_PAPER, ATTNRES_PAPER = "Zhu et al. 2025, 2409.19606", "Xie et al., 2512.24880", "2603.15031"


def measure(settings: Mapping[str, Any], weights: Path) -> MeasuredCell:
    """Train one network, or read its weights, and ask which of its states are the same and what its blocks are worth.

    ``weights``: where they are saved.
    Returns: States are those between blocks; of attention residuals, what the first sublayer of a block reads.
    """
    build = partial(_build, scale=settings["branch_scale"])
    model, facts = trained_once(settings, build, weights)
    started = time.process_time()
    before, _ = analysed(fresh(settings, build).model, settings, METRICS)
    model.eval()
    analysis, run = analysed(model, settings, METRICS)
    blocks = settings["depth"]
    same, fresh_same = (least_alike(each, blocks) for each in (analysis, before))
    first, last = longest_range(same >= ALIKE)
    memory = run.attrs.get("memory", {})
    costs = _left_out(model, settings["length"], blocks)
    numbers = {
        "loss": held_out_loss(model, corpus(), length=settings["length"]),
        "start_loss": facts["start_loss"],
        "alike": same[0, -1],
        **{
            f"alike_{name}": between_blocks(analysis, metric, blocks)[0, -1]
            for name, (metric, _) in {**VIEWS, **FURTHER}.items()
        },
        "start_alike": fresh_same[0, -1],
        "same_from": same_from(same),
        "longest_same": last - first,
        "turn": 180.0 * between_blocks(analysis, "angular_distance", blocks)[0, -1],
        "severity": _severity(analysis),
        "skip_later": costs["last"][blocks // 2 - 1],
        "skip_same": _cost(model, settings["length"], range(first, last)),
        "kept_bytes": memory.get("measured_kept_bytes", np.nan) / memory.get("measured_tokens", 1),
    }
    numbers["seconds"] = facts["train_seconds"] + time.process_time() - started
    curves = {
        "to_last": same[:, -1].tolist(),
        "start_to_last": fresh_same[:, -1].tolist(),
        "table": same.ravel().tolist(),
        "skip_last": costs["last"],
        "skip_each": costs["each"],
    }
    return MeasuredCell({name: float(value) for name, value in numbers.items()}, curves, run)


def _build(family: str, size: Size, seed: int, scale: float) -> nn.Module:
    model = make(family, size, seed)
    return model if scale == 1.0 else scale_branches(model, scale)


def between_blocks(analysis: xr.Dataset, metric: str, blocks: int) -> np.ndarray:
    """A metric of every two states between blocks, (blocks + 1, blocks + 1), of ordinary tokens and without bias."""
    at = {
        dim: label
        for dim, label in (("estimator", "unbiased"), ("tokens", "ordinary"))
        if dim in analysis[metric].dims
    }
    table = analysis[metric].sel(at).squeeze(drop=True).transpose("depth", "other_depth")
    # Where a state is shown after every sublayer, the states between blocks are every second one.
    every = (len(table) - 1) // blocks
    assert len(table) == every * blocks + 1, f"{len(table)} states of {blocks} blocks"
    return np.asarray(table.values[::every, ::every], dtype=float)


def least_alike(analysis: xr.Dataset, blocks: int) -> np.ndarray:
    """The least CKA of every two states between blocks over the views that decide."""
    return np.fmin.reduce([between_blocks(analysis, metric, blocks) for metric, _ in VIEWS.values()])


def same_from(same: np.ndarray) -> int:
    """The first state from which on every two are the same; the last one where none is.

    Examples
    --------
    >>> same_from(np.array([[1.0, 0.5, 0.4], [0.5, 1.0, 0.97], [0.4, 0.97, 1.0]]))
    1
    """
    return next(start for start in range(len(same)) if (same[start:, start:] >= ALIKE).all())


def _severity(analysis: xr.Dataset) -> float:
    """Of the verdict that is asked for: 0 passed, 1 a note, 2 a warning, 3 a failure; NaN where it could not judge."""
    found = [each.severity for each in judge(analysis, passed=True) if each.verdict == "same_representation"]
    return float(max(found)) if found else float("nan")


def _left_out(model: nn.Module, length: int, blocks: int) -> dict[str, list[float]]:
    """What the loss gains without the last 1, 2, … blocks, and without each one."""
    return {
        "last": [_cost(model, length, range(blocks - count, blocks)) for count in range(1, blocks + 1)],
        "each": [_cost(model, length, [block]) for block in range(blocks)],
    }


def _cost(model: nn.Module, length: int, left_out: Sequence[int]) -> float:
    """The held-out loss without some blocks less that with all, in nats per byte; NaN of none."""
    if not left_out:
        return float("nan")
    base = held_out_loss(model, corpus(), length=length, windows=WINDOWS)
    with without_blocks(model, left_out):
        return held_out_loss(model, corpus(), length=length, windows=WINDOWS) - base


@contextmanager
def without_blocks(model: nn.Module, left_out: Sequence[int]) -> Iterator[None]:
    """The network without some blocks: the state before them goes on, and nothing reads their outputs.

    Yields: All blocks are there again on the way out.
    """
    names = ("branches", "queries") if isinstance(model, DepthAttentionLM) else ("blocks",)
    parts = len(names)  # a block of attention residuals has two branches, with a query each
    every = {name: getattr(model, name) for name in names}
    gone = {parts * block + part for block in left_out for part in range(parts)}
    try:
        for name, modules in every.items():
            rest = (module for number, module in enumerate(modules) if number not in gone)
            setattr(model, name, nn.ModuleList(rest))
        yield
    finally:
        for name, modules in every.items():
            setattr(model, name, modules)


def _main(networks: Networks, name: str, family: str) -> list[float]:
    return networks.first_variant.numbers(name, family)


CLAIMS = (
    *(
        Claim(
            f"{title} holds one representation in all of its {{depth}} blocks",
            HC_PAPER,
            "CKA of the first and the last state, the least of four views,",
            partial(_main, name="alike", family=family),
            above=ALIKE,
        )
        for family, title in FAMILIES.items()
    ),
    *(
        Claim(
            f"{title}: the later half of the blocks can be left out",
            "this project",
            "rise of the loss in nats per byte",
            partial(_main, name="skip_later", family=family),
            below=0.05,
        )
        for family, title in FAMILIES.items()
    ),
    *(
        Claim(
            f"{FAMILIES[family]}: the loss is below that of a residual network of this size",
            source,
            "held-out loss below the residual one's, in nats per byte,",
            lambda networks, family=family: networks.first_variant.between("loss", "residual", family),
            above=0.02,
        )
        for family, source in (
            ("hc", HC_PAPER),
            ("mhc", MHC_PAPER),
            ("mhc-lite", "2601.05732"),
            ("attnres", ATTNRES_PAPER),
        )
    ),
)


STUDY = Study(
    name="answer",
    question="Does the signal degenerate into one representation that is the same in all layers?",
    sources=(HC_PAPER, MHC_PAPER, "mHC-lite, 2601.05732", ATTNRES_PAPER),
    families=FAMILIES,
    scale=Scale(
        depths=(4,),
        seeds=5,
        batch=2,
        variants=(
            MAIN,
            *({"steps": SHORT, "branch_scale": dose, "seeds": 3} for dose in DOSES),
            {"steps": LONG, "branch_scale": 1.0},
        ),
    ),
    quick=Scale(
        depths=(2,),
        seeds=2,
        width=16,
        batch=2,
        length=16,
        variants=(
            {"steps": 2, "branch_scale": 1.0},
            {"steps": 2, "branch_scale": 0.01, "seeds": 1},
            {"steps": 3, "branch_scale": 1.0},
        ),
    ),
    measure=measure,
    numbers=NUMBERS,
    curves=CURVES,
    table=CLAIMS,
    limits=(
        "One size, one text, one learning rate: what larger networks do is not known from it. HC and mHC are the "
        "hyper-connections package's; mHC-lite and attention residuals are written here after their equations."
    ),
    keeps_weights=True,
)
