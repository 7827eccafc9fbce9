"""Which laws are drawn over a measured curve? Their values on its axis, or the reason why there are none."""

from __future__ import annotations

from dataclasses import dataclass

import xarray as xr

from depthscope.diagnostics.quantities.registry import Unavailable
from depthscope.diagnostics.theory.catalogue import LAWS
from depthscope.diagnostics.theory.laws import Law, Measured


@dataclass(frozen=True, eq=False)
class Overlay:
    """A law for a curve: its values, or the reason why there are none.

    ``law``: the law.
    ``values``: on the axis of the measured curve; NaN where the law is undefined.
    ``reason``: why there are no values; empty where there are.
    """

    law: Law
    values: xr.DataArray | None
    reason: str = ""


def overlay_laws(curve: xr.DataArray, analysis: xr.Dataset) -> list[Overlay]:
    """The laws of a measured curve, each with its values or the reason why there are none.

    ``curve``: A slice of the analysis along ``depth`` or ``connection``, under the metric's name.
    ``analysis``: the analysis from which it was taken.
    Returns: One for each law of the metric, in the order of `LAWS`; none for a curve of one point.

    Examples
    --------
    >>> norm = xr.DataArray([1.0, 2.0], dims="depth", name="residual_norm")
    >>> overlay_laws(norm, norm.to_dataset())[0].reason
    'the analysis contains no adjacent_cosine'
    """
    # A law starts from the first value or the first step: over one point it would be the data themselves.
    if curve.size < 2:
        return []
    measured = Measured(curve, analysis)
    overlays = []
    for law in LAWS.values():
        if law.function is None or curve.name not in law.metrics:
            continue
        try:
            values = curve.copy(data=law.function(measured))
        except Unavailable as reason:
            overlays.append(Overlay(law, None, str(reason)))
        else:
            overlays.append(Overlay(law, values))
    return overlays


def null_law(metric: str) -> Law | None:
    """The law that gives a metric's null."""
    return next((law for law in LAWS.values() if law.function is None and metric in law.metrics), None)
