"""Runs of states that are given, and states to give: a stack of independent unit branches."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema

SAMPLES, TOKENS, FEATURES = 3, 24, 32


def run_of(states, gradient=None, *, sites=None, mask=None, **attrs: Any) -> xr.DataTree:
    """A run of states (depth, sample, token, feature), or of streams (depth, sample, token, stream, feature)."""
    values = [np.asarray(each, np.float32) for each in (states, gradient) if each is not None]
    values = [each[:, :, :, None] if each.ndim == 4 else each for each in values]
    depths, streams = np.arange(len(values[0])), values[0].shape[3]
    coords = {
        "depth": depths,
        "layer": ("depth", depths - 1),
        "site": ("depth", np.array(sites or ["embed", *["post"] * (len(depths) - 1)], dtype=object)),
        "module": ("depth", np.array(["m"] * len(depths), dtype=object)),
        "stream": np.arange(streams),
    }
    variables = {
        name: (schema.STATE, each) for name, each in zip(("residual", "gradient"), values, strict=False)
    }
    variables["mask"] = (("sample", "token"), np.ones(values[0].shape[1:3], bool) if mask is None else mask)
    facts = {"family": "hc" if streams > 1 else "residual", "n_streams": streams}
    return schema.create_run(xr.Dataset(variables, coords), attrs=facts | attrs)


def walk(layers=8, seed=0, branch=1.0):
    """A stack of independent unit branches."""
    steps = np.random.default_rng(seed).standard_normal((layers + 1, SAMPLES, TOKENS, FEATURES))
    steps[1:] *= branch
    return np.cumsum(steps, axis=0)
