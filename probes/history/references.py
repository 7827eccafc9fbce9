"""How far is a checkpoint from the first and the last one? The states of the same tokens, and the weights of each module.

Shapes: L depth, K sampled token, D feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics import schema
from depthscope.diagnostics.kernels import similarity
from depthscope.diagnostics.quantities.tokens import evenly_spaced
from depthscope.probes.model.modules import all_modules
from depthscope.probes.statistics.weight_updates import unreadable

NUM_TOKENS = 128
"""Sampled tokens of a comparison, the same in every checkpoint: as many as a live row has."""

SAMPLED = "sampled_state"
"""The variable that a checkpoint's own file has for comparisons with others; the history does not."""


def sampled_states(trace: xr.Dataset) -> np.ndarray:
    """The mean over streams of `NUM_TOKENS` real tokens, evenly spaced, at every depth."""
    mask = trace["mask"].transpose("sample", "token").values
    real = np.argwhere(mask)
    chosen = real[evenly_spaced(len(real), NUM_TOKENS)]
    states = trace["residual"].transpose(*schema.STATE)
    # float64 sums, as `States` has them: of many streams that nearly cancel, the rounding would be the mean.
    rows = [of.values[chosen[:, 0], chosen[:, 1]].mean(1, dtype=np.float64) for of in states]
    return np.stack(rows).astype(np.float32)


def compared_states(states: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased CKA, and the relative distance, of the same tokens in two checkpoints.

    ``states, other``: of `sampled_states`; ``other`` is what the distance is relative to.
    Returns: CKA; and ‖X − Y‖_F / ‖Y‖_F. NaN where a state is not finite, or Y is zero.
    """
    finite = np.isfinite(states).all((1, 2)) & np.isfinite(other).all((1, 2))
    cka, distance = np.full(len(states), np.nan), np.full(len(states), np.nan)
    for depth in np.flatnonzero(finite):
        x, y = states[depth].astype(np.float64), other[depth].astype(np.float64)
        # Unbiased HSIC is defined from four tokens on.
        if len(x) > 3:
            cka[depth] = float(similarity.linear_cka(x, y, unbiased=True))
        size = np.linalg.norm(y)
        if size > 0:
            distance[depth] = np.linalg.norm(x - y) / size
    return cka, distance


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters on the CPU, by name."""
    return {name: of.detach().cpu().clone() for name, of in model.named_parameters() if not unreadable(of)}


def weight_distances(
    model: nn.Module, first: Mapping[str, torch.Tensor], trace: xr.Dataset
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Squares of ‖W‖, ‖W − W₀‖ and ‖W₀‖ of each module, with the coordinates of ``/statistics``.

    Returns: Variables of one step, and coordinates; a module with parameters that the first checkpoint has not, or in
    another shape, is NaN.
    """
    paths: list[str] = []
    squares: list[list[float]] = []
    counts: list[float] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = dict(model.named_modules())
    places = {id(module): path for path, module in known.items()}
    for module in all_modules(model):
        # A parameter that two modules share counts for the first of them, as in `WeightNorms`.
        owned = [(names.pop(id(p)), p) for p in module.parameters(recurse=False) if id(p) in names]
        owned = [(name, p) for name, p in owned if not unreadable(p) and p.is_floating_point()]
        if not owned:
            continue
        paths.append(places.get(id(module), ""))
        counts.append(float(sum(p.numel() for _, p in owned)))
        squares.append(
            [sum(of) for of in zip(*(_squares(p, first.get(name)) for name, p in owned), strict=True)]
        )
    values = np.array(squares).T
    variables: dict[str, Any] = {
        name: (schema.MOTION, row[None])
        for name, row in zip(
            ("weight_square_norm", "weight_first_square_distance", "weight_first_square_norm"),
            values,
            strict=True,
        )
    }
    variables["weight_count"] = ("weight", np.array(counts))
    coords = {
        "weight": np.array(paths, dtype=object),
        "weight_layer": ("weight", np.array([_layer_of(path, trace) for path in paths])),
    }
    return variables, coords


def _squares(parameter: nn.Parameter, first: torch.Tensor | None) -> tuple[float, float, float]:
    now = parameter.detach().cpu().double()
    if first is None or first.shape != now.shape:
        return float(now.square().sum()), float("nan"), float("nan")
    before = first.double()
    return float(now.square().sum()), float((now - before).square().sum()), float(before.square().sum())


def _layer_of(path: str, trace: xr.Dataset) -> int:
    """Number of the block that contains a module, -1 outside of all blocks."""
    for state, layer in zip(trace["module"].values.tolist(), trace["layer"].values.tolist(), strict=True):
        # A state in the middle of a block is shown by a module inside of it: layers.3.attn is of the block layers.3.
        block = re.match(r"(?:.*\.)?\d+(?=\.|$)", str(state))
        if layer >= 0 and block is not None and f"{path}.".startswith(f"{block[0]}."):
            return int(layer)
    return -1
