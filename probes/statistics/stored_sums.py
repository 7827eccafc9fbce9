"""How can the streamed sums of two runs be added without the model? A run stores them as variables; here and back.

Shapes: L depth, V view of the streams (their mean, then each), D feature, P pair of features, m bucket, h heavy token. Numbers
are stored relative to each feature's spread about the mean, so that float32 is enough for the sketch at any offset and size;
the products, whose small directions are differences of large numbers, stay float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.probes.statistics.depth_sketch import Sketch
from depthscope.probes.statistics.second_moments import Moments
from depthscope.probes.statistics.streamed_sums import MEAN, StreamedSums

MAX_STORED_BYTES = 2**28  # of one stage's products (a heuristic of ours: a run is a file that people share)
# Stored with the sums: sketches by different hashes must not be added.
HASH = "multiply-xorshift 0x45D9F3B, of sequence and position"
MOMENT_VARIABLES = ("sum_mean", "sum_size", "sum_product")
SKETCH_VARIABLES = (
    *("sum_token_mean", "sum_token_square", "sum_bucket", "sum_sign"),
    *("sum_heavy", "sum_index", "sum_score"),
)


def stored_variables(sums: StreamedSums, depths: Sequence[int]) -> dict[str, Any]:
    """Variables from which `restore_sums` rebuilds the sums of a stage; none where they exceed `MAX_STORED_BYTES`."""
    views = sorted(view for depth, view in sums.moments if depth == depths[0])
    moments = [[sums.moments[depth, view] for view in views] for depth in depths]
    width = len(moments[0][0].mean_D)
    # D (D + 1) / 2 pairs of 8 bytes
    if len(depths) * len(views) * width * (width + 1) * 4 > MAX_STORED_BYTES:
        return {}
    size = torch.stack([torch.stack([_feature_size(of) for of in row]) for row in moments])
    attrs: dict[str, Any] = {
        "rounding": [row[0].rounding for row in moments],
        "num_streams": sums.num_streams,
        "every": sums.every,
    }
    if sums.streams_left_out:
        attrs["streams_left_out"] = sums.streams_left_out
    variables: dict[str, Any] = {
        "sum_mean": (("depth", "view", "feature"), _stacked([[of.mean_D for of in row] for row in moments])),
        "sum_size": (("depth", "view", "feature"), size.numpy()),
        "sum_product": (
            ("depth", "view", "pair"),
            _stacked([[_relative_products(of) for of in row] for row in moments]),
            attrs,
        ),
    }
    sketch = sums.sketch_of(depths)
    if sketch is not None:
        variables.update(_sketch_variables(sketch, size[:, MEAN], sums.sequences))
    return variables


def _feature_size(of: Moments) -> torch.Tensor:
    """Root of every feature's Σ (x − mean)², 1 where that is 0."""
    size = of.scatter_DD.diagonal().cpu().sqrt()
    return torch.where(size > 0, size, 1.0)


def _relative_products(of: Moments) -> torch.Tensor:
    """The upper triangle of the scatter as correlations: C_ij / √(C_ii C_jj)."""
    size_D, width = _feature_size(of), len(of.mean_D)
    rows, columns = torch.triu_indices(width, width)
    return of.scatter_DD.cpu()[rows, columns] / size_D[rows] / size_D[columns]


def _stacked(rows: Sequence[Sequence[torch.Tensor]]) -> np.ndarray:
    return torch.stack([torch.stack([value.cpu() for value in row]) for row in rows]).numpy()


def _sketch_variables(
    sketch: Sketch, size_LD: torch.Tensor, sequences: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    sketch = Sketch(*(value.cpu() for value in sketch))
    is_token_h = (sketch.score_h >= 0).double()  # 0 in slots that padding fills: no mean is subtracted there
    mean, size = sketch.mean_LD[:, None], size_LD[:, None]
    light = (sketch.buckets_LmD - sketch.signs_m[:, None] * mean) / size
    heavy = (sketch.heavy_LhD - is_token_h[:, None] * mean) / size
    attrs = {"hash": HASH, "sequences": [list(span) for span in sequences]}
    return {
        "sum_bucket": (("depth", "bucket", "feature"), light.float().numpy()),
        "sum_sign": ("bucket", sketch.signs_m.numpy(), attrs),
        "sum_token_mean": (("depth", "feature"), sketch.mean_LD.numpy()),
        "sum_token_square": ("depth", sketch.trace_L.numpy()),
        "sum_heavy": (("depth", "heavy", "feature"), heavy.float().numpy()),
        "sum_index": ("heavy", sketch.index_h.numpy()),
        "sum_score": ("heavy", sketch.score_h.numpy()),
    }


def restore_sums(statistics: xr.Dataset) -> StreamedSums:
    """Rebuild the sums from the variables of `stored_variables`."""
    missing = [name for name in MOMENT_VARIABLES if name not in statistics]
    if missing:
        raise InputError(
            f"the run stores no {missing[0]}; expected one that was captured with streaming=True and is not so wide and deep "
            f"that its sums take more than {MAX_STORED_BYTES // 2**20} MiB: capture both parts in one run"
        )
    sums = StreamedSums()
    depths = tuple(statistics["depth"].values.tolist())
    count, mean, size, product = (
        torch.from_numpy(statistics[name].values) for name in ("streamed_count", *MOMENT_VARIABLES)
    )
    attrs = statistics["sum_product"].attrs
    sums.num_streams, sums.every = attrs["num_streams"], attrs["every"]
    sums.streams_left_out = attrs.get("streams_left_out", "")
    for i, depth in enumerate(depths):
        for view in range(mean.shape[1]):
            scatter = _scatter(product[i, view], size[i, view])
            sums.moments[depth, view] = Moments(count[i], mean[i, view], scatter, attrs["rounding"][i])
    sums.left_out[depths] = torch.tensor(statistics["streamed_count"].attrs["left_out"])
    if all(name in statistics for name in SKETCH_VARIABLES):
        sums.sketches[depths] = _restored_sketch(statistics, count[0], size[:, MEAN])
        sums.sequences = tuple((a, b) for a, b in statistics["sum_sign"].attrs["sequences"])
    return sums


def _scatter(product_P: torch.Tensor, size_D: torch.Tensor) -> torch.Tensor:
    width = len(size_D)
    rows, columns = torch.triu_indices(width, width)
    scatter = size_D.new_zeros(width, width)
    scatter[rows, columns] = product_P * size_D[rows] * size_D[columns]
    return scatter


def _restored_sketch(statistics: xr.Dataset, count: torch.Tensor, size_LD: torch.Tensor) -> Sketch:
    mean_LD, trace_L, buckets, signs_m, heavy, index_h, score_h = (
        torch.from_numpy(statistics[name].values) for name in SKETCH_VARIABLES
    )
    mean, size = mean_LD[:, None], size_LD[:, None]
    is_token_h = (score_h >= 0).double()
    return Sketch(
        count=count,
        mean_LD=mean_LD,
        trace_L=trace_L,
        buckets_LmD=buckets.double() * size + signs_m[:, None] * mean,
        signs_m=signs_m,
        heavy_LhD=heavy.double() * size + is_token_h[:, None] * mean,
        index_h=index_h,
        score_h=score_h,
    )
