"""What does each further stream cost? The study's mHC model over n, by formula and as measured in a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from depthscope import probes
from depthscope.app.study.recipe import Recipe
from depthscope.app.study.small_lm import NUM_BYTES, build
from depthscope.diagnostics.kernels.memory import bytes_text

STREAMS = (1, 2, 4, 8)
"""Numbers of streams; one is the residual model."""

COLUMNS = ("streams", "elements moved", "fused", "saved for the backward", "recomputed", "measured in all")
"""Elements in units of a plain residual's; bytes of a token."""


def memory_over_streams(recipe: Recipe, streams: Sequence[int] = STREAMS) -> list[dict[str, Any]]:
    """Capture an untrained model for each number of streams.

    What is kept does not depend on the weights, so that nothing is trained.

    Returns: The attribute ``memory`` of each run, with ``streams``; the residual model has no formula but the measured
    part.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    ids = torch.randint(NUM_BYTES, (recipe.batch, recipe.length), generator=generator)
    rows = []
    for n in streams:
        model = build("residual" if n == 1 else "mhc", size=replace(recipe.size, streams=n), seed=recipe.seed)
        run = probes.capture(model, {"input_ids": ids, "labels": ids}, gradients=True, max_sequences=1)
        rows.append({"streams": n, **run.attrs["memory"]})
    return rows


def table_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows as text under `COLUMNS`."""

    def in_bytes(row: dict[str, Any], key: str) -> str:
        return bytes_text(row[key]) if key in row else "–"

    def in_residuals(row: dict[str, Any], key: str) -> str:
        # One stream is the unit.
        return f"{row.get(key, 1.0):.3g} ×"

    return [
        [
            str(row["streams"]),
            in_residuals(row, "traffic_ratio"),
            in_residuals(row, "fused_traffic_ratio"),
            in_bytes(row, "kept_bytes"),
            in_bytes(row, "recomputed_kept_bytes"),
            bytes_text(row["measured_kept_bytes"] / row["measured_tokens"]),
        ]
        for row in rows
    ]
