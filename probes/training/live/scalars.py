"""Which single numbers does a dashboard of trainings get? Curves of a row, point by point, under the names of the field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from depthscope.probes.training.live.row import LiveRow

# As the mHC paper calls them; every other metric has the catalogue's name.
KNOWN_AS = {"mixing_gain": "amax_gain", "composite_gain": "composite_amax_gain"}
SIDES = {"forward": "fwd", "backward": "bwd"}
# One variant of each metric: pooled tokens, as they are; the typical token, and for gains the paper's mean and the worst one.
VARIANT = {"scope": "data", "tokens": "all", "centering": "raw", "estimator": "unbiased"}
REDUCED = ("median",)
GAINS_REDUCED = ("mean", "max")
POINTS = ("depth", "connection", "weight")


def scalars(row: LiveRow) -> dict[str, float]:
    """A row as single finite numbers.

    Returns: ``NAME`` for one number a step, ``NAME/depth_3`` for curves by depth (in the mean over streams), such as
    ``amax_gain_fwd/connection_3`` (mean over tokens) and ``amax_gain_fwd_max/connection_3``; shares of streams end in
    ``/stream_0``. Tables of all pairs of depths, and singular values, are left out.
    """
    found: dict[str, float] = {}
    for path, (dims, values, _) in row.numbers.items():
        group, _, name = path.rpartition("/")
        chain = group.partition("/")[2]
        labels = {
            dim: row.coords[f"{group}/{dim}"][1].tolist() for dim in dims if f"{group}/{dim}" in row.coords
        }
        for shown, value in _points(name, dims, values, labels):
            if math.isfinite(value):
                found[f"{chain}/{shown}" if chain else shown] = value
    return found


def _points(
    name: str, dims: tuple[str, ...], values: np.ndarray, labels: Mapping[str, list[object]]
) -> Iterator[tuple[str, float]]:
    """The numbers of one metric, each with its name."""
    if any(dim not in labels for dim in dims) or {"other_depth", "other_connection"} & set(dims):
        return
    shown = KNOWN_AS.get(name, name)
    reductions = GAINS_REDUCED if name in KNOWN_AS else REDUCED
    for index in np.ndindex(values.shape):
        at = {dim: labels[dim][i] for dim, i in zip(dims, index, strict=True)}
        if any(at.get(dim, label) != label for dim, label in VARIANT.items()):
            continue
        if at.get("reduction", reductions[0]) not in reductions:
            continue
        if "stream" in at and (at["stream"] == "mean") == name.endswith("_share"):
            continue
        # The first reduction is what the name alone means.
        words = [shown, SIDES.get(str(at.get("direction")), ""), str(at.get("kind", ""))]
        words += [str(at["reduction"])] if at.get("reduction", reductions[0]) != reductions[0] else []
        places = [f"{dim}_{at[dim]}" if dim != "weight" else str(at[dim]) for dim in POINTS if dim in at]
        places += [f"stream_{at['stream']}"] if name.endswith("_share") else []
        yield "/".join(["_".join(word for word in words if word), *places]), float(values[index])
