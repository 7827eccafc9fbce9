"""What is measured of a network? How similar its states are after training, before it, and what its blocks are worth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from benchmarks.answer.networks import compiled_copy, make, without_blocks
from depthscope import analyze, capture, judge, settle
from depthscope.app.demo.small_lm import Size
from depthscope.app.demo.training import Recipe, corpus, held_out_loss, train
from depthscope.diagnostics.kernels.similarity import linear_cka
from depthscope.diagnostics.verdicts.same_representation import ALIKE

# The joined state (streams × features) is the estimand: all that the next layer can read. The others are for robustness.
VIEWS = {
    "joined": "joined_cka",
    "mean": "cka",  # of each stream, and the mean
    "stream": "least_stream_cka",
    "trimmed": "trimmed_cka",  # without large features
}
# What the verdict same_representation judges by, besides these.
METRICS = (*VIEWS.values(), "angular_distance", "num_tokens")
# Held-out sequences that are captured, and windows on which the loss without some blocks is compared with all of them.
SEQUENCES, WINDOWS = 4, 16
# Whitening needs many tokens for each feature.
WHITENED_SEQUENCES = 32
QUARTERS = 4


def measure(settings: Mapping[str, Any], states: Path, *, compiled: bool) -> dict[str, Any]:
    """Train one network, and ask which of its states are the same and what its blocks are worth.

    ``settings``: family, depth, seed, steps, branch_scale, rate, width, heads, streams, batch, length.
    ``states``: folder of the last state of each design's first seed, with which those of the other seeds are compared.
    Returns: Numbers and curves by column of the table. States are those between blocks; of attention residuals, what the
    first sublayer of a block reads.
    """
    started = time.process_time()
    model = _fresh(settings)
    before, _ = analysed(model, settings["length"])
    losses = trained(model, settings, compiled=compiled)
    model.eval()
    blocks, length = settings["depth"], settings["length"]
    analysis, run = analysed(model, length)
    return {
        "loss": held_out_loss(model, length=length),
        **{f"course_{part}": float(np.mean(each)) for part, each in zip("ab", _last_fifths(losses), strict=True)},
        **similarities(analysis, before, blocks),
        "alike_whitened": whitened_cka(model, _held_out(length, WHITENED_SEQUENCES)),
        "other_seed": _other_seed(run, settings, states),
        "kept_bytes": run.attrs["memory"]["measured_kept_bytes"] / run.attrs["memory"]["measured_tokens"],
        **{f"skip_{quarter + 1}": cost(model, length, part) for quarter, part in enumerate(quarters(blocks))},
        "seconds": time.process_time() - started,
    }  # fmt: skip


def rate_loss(settings: Mapping[str, Any], *, compiled: bool) -> float:
    """The held-out loss of a short training at a learning rate; infinite where it diverged."""
    model = _fresh(settings)
    trained(model, settings, compiled=compiled)
    found = held_out_loss(model.eval(), length=settings["length"])
    return found if np.isfinite(found) else float("inf")


def _fresh(settings: Mapping[str, Any]) -> nn.Module:
    size = Size(settings["depth"], settings["width"], settings["heads"], settings["streams"])
    return make(settings["family"], size, settings["seed"], settings["branch_scale"])


def trained(model: nn.Module, settings: Mapping[str, Any], *, compiled: bool) -> list[float]:
    """Train in place; the loss of every step, nats per byte."""
    names = ("steps", "seed", "batch", "length")
    recipe = Recipe(learning_rate=settings["rate"], **{name: settings[name] for name in names})
    if not compiled:
        return train(model, recipe)
    copy = compiled_copy(model)
    losses = train(copy, recipe)
    model.load_state_dict(copy.state_dict())
    return losses


def _last_fifths(losses: Sequence[float]) -> list[np.ndarray]:
    """The losses of the last but one and of the last fifth of a training: equal where it has flattened."""
    return np.array_split(np.array(losses), 5)[-2:] if len(losses) >= 5 else [np.array(losses)] * 2


def similarities(analysis: xr.Dataset, before: xr.Dataset | None, blocks: int) -> dict[str, Any]:
    """CKA of the first and the last state in every view, along depth of the joined one, fresh, and the verdict."""
    views = {name: between_blocks(analysis, metric, blocks) for name, metric in VIEWS.items()}
    fresh = None if before is None else between_blocks(before, "joined_cka", blocks)
    return {
        **{f"alike_{name}": view[0, -1] for name, view in views.items()},
        "start_alike": np.nan if fresh is None else fresh[0, -1],
        "same_from": same_from(views["joined"]),
        "severity": severity(analysis),
        "to_last": views["joined"][:, -1].tolist(),
        "start_to_last": [] if fresh is None else fresh[:, -1].tolist(),
    }


def analysed(model: nn.Module, length: int) -> tuple[xr.Dataset, xr.DataTree]:
    """The metrics of a network on evenly spread held-out sequences, the same ones for every network of a length; its run."""
    batch = _held_out(length, SEQUENCES)
    run = capture(model, batch, gradients=True, max_sequences=SEQUENCES)
    run = settle(run, model, batch, forwards=0)  # for the bytes that a forward keeps
    analysis = analyze(run, metrics=METRICS)
    assert isinstance(analysis, xr.Dataset)
    return analysis, run


def _other_seed(run: xr.DataTree, settings: Mapping[str, Any], states: Path) -> float:
    """CKA of the last state with that of the design's first seed: what two networks that learnt the same task share."""
    rows = _joined(run, -1)
    names = ("family", "depth", "steps", "branch_scale")
    file = states / ("_".join(str(settings[name]) for name in names) + ".npy")
    if settings["seed"] == 0:
        states.mkdir(parents=True, exist_ok=True)
        np.save(file, rows)
    if settings["seed"] == 0 or not file.exists():
        return float("nan")
    return float(linear_cka(np.load(file), rows, unbiased=True))


def _held_out(length: int, sequences: int) -> dict[str, torch.Tensor]:
    """Evenly spread held-out sequences."""
    held_out = corpus()[1]
    starts = torch.linspace(0, len(held_out) - length - 1, sequences).long()[:, None]
    ids = held_out[starts + torch.arange(length)]
    return {"input_ids": ids, "labels": ids}


def _joined(run: xr.DataTree, depth: int) -> np.ndarray:
    """The joined state of every token, (tokens, streams × features)."""
    state = (
        run["trace"]["residual"].isel(depth=depth).transpose("sample", "token", "stream", "feature").values
    )
    return state.reshape(state.shape[0] * state.shape[1], -1)


def whitened_cka(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    """CKA of the first and the last state when every principal direction of a state counts the same."""
    run = capture(model, batch, max_sequences=WHITENED_SEQUENCES)
    return float(linear_cka(*(_whitened(_joined(run, depth)) for depth in (0, -1)), unbiased=True))


def _whitened(rows: np.ndarray) -> np.ndarray:
    """Rows in their principal directions, all of variance one; directions of rounding errors (float32) are left out."""
    directions, sizes, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return np.asarray(directions[:, sizes > 1e-5 * sizes[0]], dtype=float)


def between_blocks(analysis: xr.Dataset, metric: str, blocks: int) -> np.ndarray:
    """A metric of every two states between blocks, (blocks + 1, blocks + 1), of ordinary tokens and without bias."""
    wanted = {"estimator": "unbiased", "tokens": "ordinary"}
    at = {dim: label for dim, label in wanted.items() if dim in analysis[metric].dims}
    table = analysis[metric].sel(at).squeeze(drop=True).transpose("depth", "other_depth")
    # Where a state is shown after every sublayer, the states between blocks are every second one.
    every = (len(table) - 1) // blocks
    assert len(table) == every * blocks + 1, f"{len(table)} states of {blocks} blocks"
    return np.asarray(table.values[::every, ::every], dtype=float)


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


def quarters(blocks: int) -> list[range]:
    """The blocks of each quarter of depth.

    Examples
    --------
    >>> quarters(6)
    [range(0, 1), range(1, 3), range(3, 4), range(4, 6)]
    """
    ends = [blocks * number // QUARTERS for number in range(QUARTERS + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def cost(model: nn.Module, length: int, left_out: Sequence[int]) -> float:
    """The held-out loss without some blocks less that with all, in nats per byte; NaN of none."""
    if not left_out:
        return float("nan")
    base = held_out_loss(model, length=length, windows=WINDOWS)
    with without_blocks(model, left_out):
        return held_out_loss(model, length=length, windows=WINDOWS) - base
