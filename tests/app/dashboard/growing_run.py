"""A training that is written step by step: ``python -m tests.app.dashboard.growing_run FOLDER STEPS SECONDS``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import xarray as xr

from depthscope.diagnostics.schema.live_store import LiveStore
from tests.models.synthetic_run import synthetic_run

SPIKE = 7
"""The step at which the norm of one depth is 50 times its usual value."""


def numbers(step: int, depths: int) -> dict[str, tuple]:
    depth = np.arange(depths, dtype=float)
    norm = (1 + depth) * (1 + 0.001 * step)
    norm[depths // 2] *= 50.0 if step == SPIKE else 1.0
    rank = 10.0 - 8.0 * depth / depths * min(step / 100, 1.0)
    return {
        "metrics/loss": ((), 3.0 / (1 + 0.01 * step)),
        "metrics/learning_rate": ((), 1e-3),
        "metrics/residual_norm": (("depth", "stream"), norm[:, None]),
        "metrics/effective_rank": (
            ("scope", "tokens", "centering", "depth", "stream"),
            rank[None, None, None, :, None],
        ),
    }


def begin(path: Path, run: xr.DataTree, *, resume: bool = False) -> LiveStore:
    return with_state(LiveStore(path, resume=resume), run)


def with_state(store: LiveStore, run: xr.DataTree) -> LiveStore:
    if not store.has_state:
        run.attrs["step"] = int(run.statistics.step.values[-1])
        store.save_state(run)
    return store


def add(store: LiveStore, step: int, depths: int) -> None:
    labels = {"stream": ["mean"], "scope": ["data"], "tokens": ["all"], "centering": ["raw"]}
    coords = {f"metrics/{dim}": ((dim,), np.array(values, dtype=object)) for dim, values in labels.items()}
    store.append(
        step, numbers(step, depths), coords=coords | {"metrics/depth": (("depth",), np.arange(depths))}
    )


if __name__ == "__main__":
    folder, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    store = begin(folder, synthetic_run("residual", layers=5))
    for step in range(steps):
        add(store, step, 6)
        time.sleep(seconds)
    store.finish()
