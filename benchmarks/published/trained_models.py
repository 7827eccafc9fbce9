"""What are these curves for trained models? Of runs that ``depthscope study`` saved, each with its own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import xarray as xr

from benchmarks.published.dense_connections import side_by_side
from benchmarks.published.gains import HC_ORDER, MHC_ORDER
from benchmarks.published.row import Row
from depthscope import diagnostics

METRICS = ["mixing_gain", "composite_gain", "adjacent_cosine_band", "depth_kernel"]
ORDERS = {"hc": HC_ORDER, "mhc": MHC_ORDER}
BRANCHES = {"attn": "attention", "mlp": "MLP"}


@cache
def measured(path: Path) -> xr.Dataset:
    """The metrics that the papers plot, of a saved run; of the last step."""
    if not path.exists():
        raise ValueError(
            f"no {path.name} in {path.parent}; give --runs the folder that depthscope study wrote"
        )
    with diagnostics.open_run(path) as run:
        if "training" not in run.attrs:
            raise ValueError(
                f"{path.name} does not say how it was trained; expected a run that depthscope study wrote"
            )
        analysis = diagnostics.analyze(run, metrics=METRICS)
        if not isinstance(analysis, xr.Dataset):
            raise ValueError(f"{path.name} has several chains; expected a run that depthscope study wrote")
        # Loaded before the file is closed.
        return analysis.isel(step=-1).load()


def gains(folder: Path) -> Iterator[Row]:
    """mHC Fig. 3 and 7 on small trained models: largest gain over the depth, mean over tokens."""
    for family, order in ORDERS.items():
        found = measured(folder / f"{family}.zarr").sel(reduction="mean")
        yield Row(f"{family}: steps of training", None, found.attrs["training"]["steps"])
        for direction in found.direction.values:
            single, product = (found[name].sel(direction=direction) for name in METRICS[:2])
            for branch, name in BRANCHES.items():
                # The paper plots attention and MLP separately.
                largest = float(single[found.branch.values == branch].max())
                yield Row(f"{family}: one connection, {name}, {direction}", None, largest)
            name = f"{family}: largest of {product.size} products, {direction} (in brackets: 27B model)"
            yield Row(name, None, float(product.max()), elsewhere=order)


def cosines(folder: Path) -> Iterator[Row]:
    """HC Fig. 3 on small trained models: cosine of a state with the one before, 5-95 % band, mean of the streams."""
    for family in ("residual", *ORDERS):
        band = measured(folder / f"{family}.zarr")["adjacent_cosine_band"]
        # The middle and the end of the curve stand for the figure.
        for depth in (band.sizes["depth"] // 2, band.sizes["depth"] - 1):
            for quantile in band["quantile"].values:
                value = band.isel(depth=depth).sel(quantile=quantile)
                yield Row(f"{family}: depth {depth}, {quantile:.0%}", None, float(value.isel(stream=0)))


def drawn(folder: Path) -> str:
    """HC Fig. 7: the dense connection matrices of the trained models, without the embedding."""
    return side_by_side(
        {family: measured(folder / f"{family}.zarr")["depth_kernel"].values for family in ORDERS}
    )
