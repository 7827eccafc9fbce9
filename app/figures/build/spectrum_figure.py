"""Which spectrum do the states have at some depths? Singular values by order, with those of noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import describe_lines, remarks_by_run
from depthscope.app.figures.build.measurement import Measurement
from depthscope.app.figures.build.values import LABELLED, names_of, pick
from depthscope.app.figures.specification import (
    Analyses,
    Array,
    FigureKind,
    Line,
    Lines,
    Selection,
    null_label,
)
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.intervals import margin

NUM_DEPTHS = 5  # each has a null: ten lines in one figure. A heuristic of ours.
NOISE_WORDS = "Dashed: the Marchenko-Pastur law, independent noise of the same shape and energy."


@dataclass(frozen=True)
class SpectrumFigure(FigureKind):
    """A figure of the singular values of the states at some depths, with those of noise of the same energy."""

    @property
    def uses(self) -> tuple[str, ...]:
        """The selected labels among the dims of the metric, the depths and the step."""
        dims = CATALOGUE[self.metric].dims
        return (*(dim for dim in LABELLED if dim in dims), "depths", "step")

    def figure(self, analyses: Analyses, choice: Selection) -> Lines:
        """The spectra of every run that has them, at the chosen depths.

        ``choice``: which version of the numbers; `depths` names the depths.
        """
        measurement = Measurement(self.metric, analyses, choice)
        lines = [
            line for run, data, _ in measurement.slices() for line in self._lines(measurement, run, data)
        ]
        measured = [line for line in lines if line.role == "measured"]
        several = any(data.sizes.get("stream", 1) > 1 for data in analyses.values())
        noise = len(measured) < len(lines)
        bands = any(line.lower is not None for line in lines)
        remarks = [
            "Of the mean over streams." if several else "",
            *(_bands(self.metric, analyses) if bands else ()),
            NOISE_WORDS if noise else "",
            "Not drawn below the rounding of float32.",
        ]
        return Lines(
            name=self.name,
            title=self.title,
            x_label="order (1 = largest)",
            y_label=measurement.axis_label("singular value"),
            lines=tuple(lines),
            # A power law is a straight line on two logarithmic axes.
            log_y=True,
            log_x=True,
            caption=measurement.caption(measured, scope=choice.scope, remarks=remarks),
            alt=describe_lines(lines, self.title, "order"),
            metric=self.metric,
            sources=("marchenko1967distribution",) if noise else (),
        )

    def _lines(self, measurement: Measurement, run: str, data: xr.Dataset) -> Iterator[Line]:
        """The measured spectrum of every depth, and that of noise, at the orders that the states can have."""
        values, error, null = (
            pick(data, f"{self.metric}{part}", measurement.choice) for part in ("", "_stderr", "_null")
        )
        assert values is not None
        error = None if error is None else margin(error)[0]
        names = names_of(values, "depth")
        for depth in _depths(values.sizes["depth"], measurement.choice):
            label = f"depth {depth}" if len(measurement.analyses) == 1 else f"{run} · depth {depth}"
            sigma, deviation, noise = (_at(part, depth, values) for part in (values, error, null))
            # All depths share the labels of `order`; beyond those that the states of this one can have they are NaN.
            reached = np.isfinite(sigma) | np.isfinite(noise)
            orders = np.asarray(values["order"].values, dtype=np.float64)[reached]
            sigma, deviation, noise = sigma[reached], deviation[reached], noise[reached]
            floor = _rounding(sigma, orders)
            # On a log axis rounding noise would look like a cliff at the end of the spectrum.
            sigma = np.where(sigma > floor, sigma, np.nan)
            lower = upper = None
            if np.isfinite(deviation).any():
                # A band that reaches zero or below cannot be drawn on a log axis.
                lower, upper = np.maximum(sigma - deviation, floor), sigma + deviation
            yield Line(
                orders, sigma, label, lower=lower, upper=upper, group=run, text=[names[depth]] * len(orders)
            )
            if np.isfinite(noise).any():
                yield Line(orders, noise, null_label(label), role="null", group=run)


def _bands(metric: str, analyses: Mapping[str, xr.Dataset]) -> list[str]:
    """What the bands are, of every number of sequences that there is."""
    errors = {run: data[f"{metric}_stderr"] for run, data in analyses.items() if f"{metric}_stderr" in data}
    return remarks_by_run(
        ((run, f"Shaded: ± {margin(error)[1]}.") for run, error in errors.items()), analyses.keys()
    )


def _depths(size: int, choice: Selection) -> list[int]:
    """The depths that were chosen and exist, or some from the first to the last."""
    if choice.depths:
        # A depth that a shallower run lacks is left out of its lines, not refused for all runs.
        return [depth for depth in choice.depths if 0 <= depth < size]
    # A set: of fewer depths than `NUM_DEPTHS` several positions round to the same one.
    return sorted({round(position) for position in np.linspace(0, size - 1, NUM_DEPTHS)})


def _at(part: xr.DataArray | None, depth: int, like: xr.DataArray) -> Array:
    """The values at one depth along `order`; NaN where the analysis has none."""
    if part is None:
        return np.full(like.sizes["order"], np.nan)
    return np.asarray(part.isel(depth=depth).values, dtype=np.float64)


def _rounding(sigma: Array, orders: Array) -> float:
    """The largest singular value that is not distinguishable from zero.

    States are float32: a matrix of rank r is known up to about r · eps · σ₁, the threshold of `numpy.linalg.matrix_rank`
    too.
    """
    known = np.isfinite(sigma)
    if not known.any():
        return 0.0
    return float(np.finfo(np.float32).eps * orders[known].max() * sigma[known].max())
