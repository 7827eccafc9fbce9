"""What a run keeps of its streamed sums so that those of another run can be added to them, without the model.

Shapes: L depth, V view of the streams (their mean, then each), D feature, P pair of features, m bucket, h heavy token. Numbers
are relative to each feature's spread about the mean, so that float32 holds the sketch at any offset and size; the products,
whose small directions are differences of large numbers, stay float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.probes.statistics.depth_sketch import Sketch
from depthscope.probes.statistics.second_moments import Moments
from depthscope.probes.statistics.streaming import MEAN, Streaming

KEPT = 2**28  # bytes of a stage's sums that a run keeps at most
HASH = "multiply-xorshift 0x45D9F3B, of sequence and position"
OF_MOMENTS = ("sum_mean", "sum_size", "sum_product")
OF_SKETCH = (
    *("sum_token_mean", "sum_token_square", "sum_bucket", "sum_sign"),
    *("sum_heavy", "sum_index", "sum_score"),
)


def kept(whole: Streaming, depths: Sequence[int]) -> dict[str, Any]:
    """Variables of a stage from which `restored` has its sums again; none where they would take more than `KEPT`.

    Parameters
    ----------
    whole : Streaming
        Of its chain, nothing waiting.
    depths : sequence of int
        The depths of the stage.

    Returns
    -------
    dict
    """
    views = sorted(view for depth, view in whole.moments if depth == depths[0])
    moments = [[whole.moments[depth, view] for view in views] for depth in depths]
    width = len(moments[0][0].mean_D)
    if len(depths) * len(views) * width * (width + 1) * 4 > KEPT:
        return {}
    size = torch.stack([torch.stack([_size(of) for of in row]) for row in moments])
    variables: dict[str, Any] = {
        "sum_mean": (("depth", "view", "feature"), _numbers([[of.mean_D for of in row] for row in moments])),
        "sum_size": (("depth", "view", "feature"), size.numpy()),
        "sum_product": (
            ("depth", "view", "pair"),
            _numbers([[_products(of) for of in row] for row in moments]),
            _told(whole, [row[0].rounding for row in moments]),
        ),
    }
    sketch = whole.sketch_of(depths)
    if sketch is None:
        return variables
    return variables | _of_sketch(sketch, size[:, 0], whole.sequences)


def _told(whole: Streaming, rounding: list[float]) -> dict[str, Any]:
    told = {"rounding": rounding, "num_streams": whole.num_streams, "every": whole.every}
    return told | ({"streams_left_out": whole.unseen_streams} if whole.unseen_streams else {})


def _size(of: Moments) -> torch.Tensor:
    """Root of every feature's Σ (x − mean)², 1 where that is 0."""
    size = of.scatter_DD.diagonal().cpu().sqrt()
    return torch.where(size > 0, size, 1.0)


def _products(of: Moments) -> torch.Tensor:
    size_D, width = _size(of), len(of.mean_D)
    rows, columns = torch.triu_indices(width, width)
    return of.scatter_DD.cpu()[rows, columns] / size_D[rows] / size_D[columns]


def _numbers(rows: Sequence[Sequence[torch.Tensor]]) -> np.ndarray:
    return torch.stack([torch.stack([value.cpu() for value in row]) for row in rows]).numpy()


def _of_sketch(sketch: Sketch, size_LD: torch.Tensor, sequences: Sequence[tuple[int, int]]) -> dict[str, Any]:
    sketch = Sketch(*(value.cpu() for value in sketch))
    known_h = (sketch.score_h >= 0).double()
    mean, size = sketch.mean_LD[:, None], size_LD[:, None]
    light = (sketch.buckets_LmD - sketch.signs_m[:, None] * mean) / size
    heavy = (sketch.heavy_LhD - known_h[:, None] * mean) / size
    told = {"hash": HASH, "sequences": [list(span) for span in sequences]}
    return {
        "sum_bucket": (("depth", "bucket", "feature"), light.float().numpy()),
        "sum_sign": ("bucket", sketch.signs_m.numpy(), told),
        "sum_token_mean": (("depth", "feature"), sketch.mean_LD.numpy()),
        "sum_token_square": ("depth", sketch.trace_L.numpy()),
        "sum_heavy": (("depth", "heavy", "feature"), heavy.float().numpy()),
        "sum_index": ("heavy", sketch.index_h.numpy()),
        "sum_score": ("heavy", sketch.score_h.numpy()),
    }


def restored(statistics: xr.Dataset) -> Streaming:
    """The sums that `kept` has written.

    Parameters
    ----------
    statistics : Dataset
        Of one stage.

    Returns
    -------
    Streaming

    Raises
    ------
    ValueError
        Where the run keeps no sums.
    """
    missing = [name for name in OF_MOMENTS if name not in statistics]
    if missing:
        raise ValueError(
            f"the run keeps no {missing[0]}; expected one that was captured with streaming=True and is not so wide and deep "
            f"that its sums take more than {KEPT // 2**20} MiB: capture both parts in one run"
        )
    found = Streaming()
    depths = tuple(statistics["depth"].values.tolist())
    count, mean, size, product = (
        torch.from_numpy(statistics[name].values) for name in ("streamed_count", *OF_MOMENTS)
    )
    told = statistics["sum_product"].attrs
    found.num_streams = told["num_streams"]
    found.unseen_streams = told.get("streams_left_out", "")
    for i, depth in enumerate(depths):
        for view in range(mean.shape[1]):
            scatter = _scatter(product[i, view], size[i, view])
            found.moments[depth, view] = Moments(count[i], mean[i, view], scatter, told["rounding"][i])
    found.every = told["every"]
    found.left_out[depths] = torch.tensor(statistics["streamed_count"].attrs["left_out"])
    if all(name in statistics for name in OF_SKETCH):
        found.sketches[depths] = _sketch(statistics, count[0], size[:, MEAN])
        found.sequences = tuple((a, b) for a, b in statistics["sum_sign"].attrs["sequences"])
    return found


def _scatter(product_P: torch.Tensor, size_D: torch.Tensor) -> torch.Tensor:
    width = len(size_D)
    rows, columns = torch.triu_indices(width, width)
    scatter = size_D.new_zeros(width, width)
    scatter[rows, columns] = product_P * size_D[rows] * size_D[columns]
    return scatter


def _sketch(statistics: xr.Dataset, count: torch.Tensor, size_LD: torch.Tensor) -> Sketch:
    mean_LD, trace_L, bucket, signs_m, heavy, index_h, score_h = (
        torch.from_numpy(statistics[name].values) for name in OF_SKETCH
    )
    mean, size = mean_LD[:, None], size_LD[:, None]
    known_h = (score_h >= 0).double()
    return Sketch(
        count=count,
        mean_LD=mean_LD,
        trace_L=trace_L,
        buckets_LmD=bucket.double() * size + signs_m[:, None] * mean,
        signs_m=signs_m,
        heavy_LhD=heavy.double() * size + known_h[:, None] * mean,
        index_h=index_h,
        score_h=score_h,
    )
