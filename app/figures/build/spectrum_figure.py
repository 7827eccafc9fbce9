"""Which spectrum do the states have at some depths? Singular values by order, with those of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import describe_lines, remarks_by_run
from depthscope.app.figures.build.measurement import Curve, Measurement
from depthscope.app.figures.build.values import LABELLED, names_of
from depthscope.app.figures.specification import (
    Analyses,
    Array,
    FigureKind,
    Lines,
    Selection,
    null_label,
)
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

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
        """The spectra of every run that has them, at the chosen depths."""
        measurement = Measurement(self.metric, analyses, choice)
        curves = [
            _of_depth(measurement, run, values.isel(depth=depth), names_of(values, "depth")[depth])
            for run, _, values in measurement.slices()
            for depth in _depths(values.sizes["depth"], choice)
        ]
        lines = [line for curve in curves for line in curve.lines]
        several = any(data.sizes.get("stream", 1) > 1 for data in analyses.values())
        noise = any(curve.null is not None for curve in curves)
        runs = {curve.line.group for curve in curves}
        remarks = [
            "Of the mean over streams." if several else "",
            *remarks_by_run(((curve.line.group, each) for curve in curves for each in curve.remarks), runs),
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
            caption=measurement.caption(
                [curve.line for curve in curves], scope=choice.scope, remarks=remarks
            ),
            alt=describe_lines(lines, self.title, "order"),
            metric=self.metric,
            sources=("marchenko1967distribution",) if noise else (),
        )


def _of_depth(measurement: Measurement, run: str, values: xr.DataArray, name: str) -> Curve:
    """The measured spectrum of a depth, and that of noise, at the orders that the states can have."""
    label = f"depth {int(values['depth'])}"
    curve = measurement.curve(run, values, axis="order", label=label)
    line, null = curve.line, curve.null
    # All depths share the labels of `order`; beyond those that the states of this one can have they are NaN.
    kept = np.isfinite(line.y) | (np.isfinite(null.y) if null is not None else False)
    orders, sigma = line.x[kept], line.y[kept]
    floor = _rounding(sigma, orders)
    lower, upper = (None if part is None else part[kept] for part in (line.lower, line.upper))
    shown = f"{run} · {label}" if len(measurement.analyses) > 1 else label
    line = replace(
        line,
        x=orders,
        # On a log axis rounding noise would look like a cliff at the end of the spectrum.
        y=np.where(sigma > floor, sigma, np.nan),
        # A band that reaches zero or below cannot be drawn on a log axis.
        lower=None if lower is None else np.maximum(lower, floor),
        upper=upper,
        label=shown,
        text=[name] * len(orders),
    )
    if null is not None:
        null = replace(null, x=orders, y=null.y[kept], label=null_label(shown))
    return Curve(line, null, curve.remarks)


def _depths(size: int, choice: Selection) -> list[int]:
    """The depths that were chosen and exist, or some from the first to the last."""
    if choice.depths:
        # A depth that a shallower run lacks is left out of its lines, not refused for all runs.
        return [depth for depth in choice.depths if 0 <= depth < size]
    # A set: of fewer depths than `NUM_DEPTHS` several positions round to the same one.
    return sorted({round(position) for position in np.linspace(0, size - 1, NUM_DEPTHS)})


def _rounding(sigma: Array, orders: Array) -> float:
    """The largest singular value that is not distinguishable from zero.

    States are float32: a matrix of rank r is known up to about r · eps · σ₁, the threshold of `numpy.linalg.matrix_rank`
    too.
    """
    known = np.isfinite(sigma)
    if not known.any():
        return 0.0
    return float(np.finfo(np.float32).eps * orders[known].max() * sigma[known].max())
