"""What is measured of a network? How similar its states are after training, before it, and what its blocks are worth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from benchmarks.answer.networks import make, without_blocks
from depthscope import analyze, capture, judge, settle
from depthscope.app.demo.small_lm import Size
from depthscope.app.demo.training import Recipe, corpus, held_out_loss, train
from depthscope.diagnostics.verdicts.same_representation import ALIKE, longest_range

# The same two states compared in several ways. Of these the least decides, as in the verdict.
VIEWS = {
    "mean": ("cka", "mean over streams"),
    "joined": ("joined_cka", "all streams joined"),
    "stream": ("least_stream_cka", "least similar stream"),
    "trimmed": ("trimmed_cka", "without large features"),
}
METRICS = (*(metric for metric, _ in VIEWS.values()), "angular_distance", "num_tokens")
# Held-out sequences that are captured, and windows on which the loss without some blocks is compared with all of them.
SEQUENCES, WINDOWS = 4, 16


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network, and ask which of its states are the same and what its blocks are worth.

    ``settings``: family, depth, seed, steps, branch_scale, width, heads, streams, batch, length.
    Returns: Numbers and curves by column of the table. States are those between blocks; of attention residuals, what the
    first sublayer of a block reads.
    """
    started = time.process_time()
    blocks, length = settings["depth"], settings["length"]
    size = Size(blocks, settings["width"], settings["heads"], settings["streams"])
    model = make(settings["family"], size, settings["seed"], settings["branch_scale"])
    before, _ = analysed(model, settings)
    recipe = Recipe(
        steps=settings["steps"], seed=settings["seed"], size=size, batch=settings["batch"], length=length
    )
    losses = train(model, recipe)
    model.eval()
    analysis, run = analysed(model, settings)
    same, fresh = (least_alike(each, blocks) for each in (analysis, before))
    first, last = longest_range(same >= ALIKE)
    skip_last = [cost(model, length, range(blocks - count, blocks)) for count in range(1, blocks + 1)]
    memory = run.attrs.get("memory", {})
    return {
        "loss": held_out_loss(model, length=length),
        "start_loss": losses[0],
        "alike": same[0, -1],
        **{f"alike_{name}": between_blocks(analysis, metric, blocks)[0, -1]
           for name, (metric, _) in VIEWS.items()},
        "start_alike": fresh[0, -1],
        "same_from": same_from(same),
        "longest_same": last - first,
        "turn": 180.0 * between_blocks(analysis, "angular_distance", blocks)[0, -1],
        "severity": severity(analysis),
        "skip_later": skip_last[blocks // 2 - 1],
        "skip_same": cost(model, length, range(first, last)),
        "kept_bytes": memory.get("measured_kept_bytes", np.nan) / memory.get("measured_tokens", 1),
        "seconds": time.process_time() - started,
        "to_last": same[:, -1].tolist(),
        "start_to_last": fresh[:, -1].tolist(),
        "table": same.ravel().tolist(),
        "skip_last": skip_last,
        "skip_each": [cost(model, length, [block]) for block in range(blocks)],
    }  # fmt: skip


def analysed(model: nn.Module, settings: Mapping[str, Any]) -> tuple[xr.Dataset, xr.DataTree]:
    """The metrics of a network on evenly spread held-out sequences, the same ones for every network of a length; its run."""
    held_out, length = corpus()[1], settings["length"]
    starts = torch.linspace(0, len(held_out) - length - 1, SEQUENCES).long()[:, None]
    ids = held_out[starts + torch.arange(length)]
    batch = {"input_ids": ids, "labels": ids}
    run = capture(model, batch, gradients=True, max_sequences=SEQUENCES)
    run = settle(run, model, batch, forwards=0)  # for the bytes that a forward keeps
    analysis = analyze(run, metrics=METRICS)
    assert isinstance(analysis, xr.Dataset)
    return analysis, run


def between_blocks(analysis: xr.Dataset, metric: str, blocks: int) -> np.ndarray:
    """A metric of every two states between blocks, (blocks + 1, blocks + 1), of ordinary tokens and without bias."""
    wanted = {"estimator": "unbiased", "tokens": "ordinary"}
    at = {dim: label for dim, label in wanted.items() if dim in analysis[metric].dims}
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


def severity(analysis: xr.Dataset) -> float:
    """Of the verdict same_representation: 0 passed, 1 a note, 2 a warning, 3 a failure; NaN where it could not judge."""
    found = [each.severity for each in judge(analysis, passed=True) if each.verdict == "same_representation"]
    return float(max(found)) if found else float("nan")


def cost(model: nn.Module, length: int, left_out: Sequence[int]) -> float:
    """The held-out loss without some blocks less that with all, in nats per byte; NaN of none."""
    if not left_out:
        return float("nan")
    base = held_out_loss(model, length=length, windows=WINDOWS)
    with without_blocks(model, left_out):
        return held_out_loss(model, length=length, windows=WINDOWS) - base
