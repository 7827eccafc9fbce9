"""What is a study? Cells that are measured one by one, what is drawn of them, and the claims that are tested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.figures import Figure
from depthscope.app.study.reproductions.claims import Claim, Row, tested

__all__ = ["Along", "Cell", "MeasuredCell", "Row", "RunNumber", "Scale", "Study"]

# Raised where the same settings give other numbers than before: saved cells of older code are then measured again.
VERSION = 1


@dataclass(frozen=True)
class Scale:
    """How large a study is: the networks, and how long they are trained.

    ``depths``: layers, of an attention and an MLP each.
    ``seeds``: seeds 0 … seeds − 1.
    ``width, heads, streams``: of the network.
    ``steps, batch, length``: of the training, and bytes of a sequence.
    ``variants``: what is changed or added in the settings, one set of networks after the other; ``seeds`` of a variant
    are at most so many.
    """

    depths: tuple[int, ...]
    seeds: int = 3
    width: int = 32
    heads: int = 2
    streams: int = 4
    steps: int = 40
    batch: int = 8
    length: int = 64
    variants: tuple[Mapping[str, float], ...] = ({},)


@dataclass(frozen=True)
class RunNumber:
    """A number of a run: a metric at some of its labels, reduced along the depth.

    ``name, title, metric``: key in a row, words for people, and the metric; none where the study measures it itself.
    ``at``: labels of its other dims; of those that are not named, the first one.
    ``over``: along depth or connections; NaN does not count.
    ``log``: whether an axis of it is logarithmic.
    """

    name: str
    title: str
    metric: str = ""
    at: Mapping[str, str] = field(default_factory=dict)
    over: str = "last"
    log: bool = False

    def of(self, analysis: xr.Dataset) -> float:
        """The number in an analysis; NaN where it has none."""
        values = profile(analysis, self.metric, self.at)
        values = values[np.isfinite(values)]
        if not values.size:
            return float("nan")
        if self.over in ("first", "last"):
            return float(values[0 if self.over == "first" else -1])
        return float(getattr(np, self.over)(values))


@dataclass(frozen=True)
class Along:
    """A curve along one network: a metric at some labels, over depth or connections, drawn for the deepest networks.

    ``name, title, metric``: key in a row, words for people, and the metric; none where the study measures it itself.
    ``at``: labels of its other dims.
    ``start``: of the fresh network, and not of the trained one.
    ``law``: name of the law of theory that is drawn over it, or empty.
    ``log``: whether its axis is logarithmic.
    """

    name: str
    title: str
    metric: str = ""
    at: Mapping[str, str] = field(default_factory=dict)
    start: bool = False
    law: str = ""
    log: bool = False


def profile(analysis: xr.Dataset, metric: str, at: Mapping[str, str]) -> np.ndarray:
    """A metric along depth or connections, or over all pairs of depths; empty where the analysis has none.

    ``at``: labels of its other dims; of those that are not named, the first one.
    """
    if metric not in analysis:
        return np.empty(0)
    values = slice_of(analysis[metric], at).values.astype(np.float64)
    # Of a matrix over pairs of depths the diagonal compares a state with itself.
    return values[~np.eye(len(values), dtype=bool)] if values.ndim == 2 else values.ravel()


def slice_of(values: xr.DataArray, at: Mapping[str, str]) -> xr.DataArray:
    """A metric with depth or connections as its only dims.

    ``at``: labels of its other dims; of those that are not named, the first one.
    """
    kept = ("depth", "other_depth", "connection")
    others = [dim for dim in values.dims if dim not in kept]
    chosen = {dim: at.get(str(dim), values[dim].values[0]) for dim in others}
    return values.sel(chosen)


@dataclass(frozen=True)
class Cell:
    """One network of a study.

    ``study``: its study.
    ``settings``: everything that its numbers depend on; plain values.
    ``keeps_run``: whether its run is saved with its row.
    """

    study: str
    settings: Mapping[str, Any]
    keeps_run: bool

    @property
    def digest(self) -> str:
        """Of the study and its settings: a saved cell is recognised by it."""
        text = json.dumps([VERSION, self.study, dict(self.settings)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For people and files, such as ``mhc-d16-s0``."""
        s = self.settings
        return f"{s['family']}-d{s['depth']}-s{s['seed']}"


@dataclass(frozen=True)
class MeasuredCell:
    """What measuring a cell gave: its row's numbers and curves, and the run, with metrics, where there is a network."""

    numbers: Mapping[str, float]
    curves: Mapping[str, Sequence[float]]
    run: xr.DataTree | None


@dataclass(frozen=True)
class Study:
    """A declared study.

    ``name, question``: the word on the command line, and what it asks.
    ``sources``: papers, as people cite them.
    ``families``: title by family.
    ``scale, quick``: its size, and that of its tests.
    ``measure``: from a cell's settings to what was measured; with the path of its weights where these are saved.
    ``numbers``: columns of the table and figures over depth.
    ``curves``: figures along the deepest networks.
    ``table``: what is tested.
    ``limits``: what is not tested here, in sentences.
    ``figures``: further figures, from the rows.
    ``trained``: whether networks are trained: else it has no depths, seeds and runs.
    ``keeps_weights``: whether they are saved: what took minutes to train is not trained again when it is measured anew.
    """

    name: str
    question: str
    sources: tuple[str, ...]
    families: Mapping[str, str]
    scale: Scale
    quick: Scale
    measure: Callable[..., MeasuredCell]
    numbers: tuple[RunNumber, ...]
    curves: tuple[Along, ...]
    table: tuple[Claim, ...]
    limits: str
    figures: Callable[[Sequence[Row]], list[Figure]] = lambda rows: []
    trained: bool = True
    keeps_weights: bool = False

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        """What was tested, with the numbers of some rows."""
        return tested(self.table, rows)

    def cells(self, scale: Scale) -> Iterator[Cell]:
        """Every cell, seed by seed: a study that is stopped early has all families and depths of some seeds."""
        shared = {
            name: getattr(scale, name) for name in ("width", "heads", "streams", "steps", "batch", "length")
        }
        for number, variant in enumerate(scale.variants):
            changed = {name: value for name, value in variant.items() if name != "seeds"}
            for seed in range(min(int(variant.get("seeds", scale.seeds)), scale.seeds)):
                for depth in scale.depths:
                    for family in self.families:
                        settings = {"family": family, "depth": depth, "seed": seed, **shared, **changed}
                        # Of the first seed alone: runs of all would take hundreds of megabytes.
                        yield Cell(self.name, settings, keeps_run=self.trained and seed == number == 0)
