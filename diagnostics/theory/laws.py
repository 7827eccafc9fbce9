"""What is a law? A declaration, a function of what was measured, and the reason why it says nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.quantities.registry import Unavailable


@dataclass(frozen=True, eq=False)
class Measured:
    """A curve of an analysis, and what the same analysis says beside it.

    Parameters
    ----------
    curve : DataArray
        One variable along ``depth`` or ``connection``; its scalar coordinates say which slice it is.
    analysis : Dataset
        The analysis that it was taken from.
    """

    curve: xr.DataArray
    analysis: xr.Dataset

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The attributes of the run."""
        return {str(name): value for name, value in self.analysis.attrs.items()}

    def label(self, dim: str) -> str:
        """Which label of a dimension the curve is a slice of, empty where it never had that dimension.

        Parameters
        ----------
        dim : str
            A dimension of the analysis.

        Returns
        -------
        str
        """
        return str(self.curve.coords[dim].item()) if dim in self.curve.coords else ""

    def other(self, name: str, *, over: str = "", **labels: str) -> np.ndarray:
        """The same slice of another variable, along the axis of the curve.

        Parameters
        ----------
        name : str
            A variable of the analysis.
        over : str
            A dimension to keep whole, behind the axis of the curve.
        **labels : str
            What the curve itself does not say.

        Returns
        -------
        ndarray

        Raises
        ------
        Unavailable
            Where the analysis does not hold it, or not defined everywhere behind the first place.
        """
        if name not in self.analysis:
            raise Unavailable(f"the analysis holds no {name}")
        array = self.analysis[name]
        known = {str(dim): c.item() for dim, c in self.curve.coords.items() if c.ndim == 0 and dim != over}
        chosen = {dim: label for dim, label in (known | labels).items() if dim in array.dims}
        array = array.sel(chosen)
        if unsaid := [str(dim) for dim in array.dims if dim not in (*self.curve.dims, over)]:
            raise Unavailable(f"the curve does not say which {' and '.join(unsaid)} it is of")
        values = array.transpose(*self.curve.dims, ...).values.astype(np.float64)
        if not np.isfinite(values[1:]).all():
            raise Unavailable(f"{name} is not defined everywhere")
        return values


@dataclass(frozen=True)
class Law:
    """What theory says about a metric.

    Parameters
    ----------
    name, label : str
        For programs, and for a legend.
    equation : str
        TeX, without dollar signs.
    cite : str
        Key of ``references.bib``.
    assumption : str
        Where it holds; ends the sentence "It holds for".
    metrics : tuple of str
        The metrics that it stands beside.
    description : str
        The first line of the docstring.
    function : function or None
        A `Measured` in, values on its axis out; None where the metric's own null is the law.
    """

    name: str
    label: str
    equation: str
    cite: str
    assumption: str
    metrics: tuple[str, ...]
    description: str
    function: Callable[[Measured], np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Overlay:
    """A law beside a curve: its values, or the reason why there are none.

    Parameters
    ----------
    law : Law
        The law.
    values : DataArray or None
        On the axis of the measured curve; NaN where the law says nothing.
    reason : str
        Why there are no values; empty where there are.
    """

    law: Law
    values: xr.DataArray | None
    reason: str = ""


LAWS: dict[str, Law] = {}
"""Every law by name."""


def law(
    *, label: str, equation: str, cite: str, assumption: str, metrics: tuple[str, ...]
) -> Callable[[Callable[[Measured], np.ndarray]], Callable[[Measured], np.ndarray]]:
    """Declare the function below as a law.

    Parameters
    ----------
    label, equation, cite, assumption, metrics
        See `Law`.

    Returns
    -------
    function
        A decorator that leaves the function as it is.
    """

    def declare(function: Callable[[Measured], np.ndarray]) -> Callable[[Measured], np.ndarray]:
        name = function.__name__
        first = (inspect.getdoc(function) or "").partition("\n")[0]
        LAWS[name] = Law(name, label, equation, cite, assumption, metrics, first, function)
        return function

    return declare


def beside(curve: xr.DataArray, analysis: xr.Dataset) -> list[Overlay]:
    """What theory says beside a measured curve.

    Parameters
    ----------
    curve : DataArray
        A slice of the analysis along ``depth`` or ``connection``, under the metric's name.
    analysis : Dataset
        The analysis that it was taken from.

    Returns
    -------
    list of Overlay
        One for each law of the metric, in the order of `LAWS`; none for a curve of one point.

    Examples
    --------
    >>> import diagnostics.theory
    >>> norm = xr.DataArray([1.0, 2.0], dims="depth", name="residual_norm")
    >>> beside(norm, norm.to_dataset())[0].reason
    'the analysis holds no adjacent_cosine'
    """
    if curve.size < 2:
        return []
    measured = Measured(curve, analysis)
    return [
        _overlay(found, measured) for found in LAWS.values() if curve.name in found.metrics and found.function
    ]


def _overlay(found: Law, measured: Measured) -> Overlay:
    assert found.function is not None
    try:
        values = found.function(measured)
    except Unavailable as reason:
        return Overlay(found, None, str(reason))
    return Overlay(found, measured.curve.copy(data=values))


def null_law(metric: str) -> Law | None:
    """The law that gives a metric's null.

    Parameters
    ----------
    metric : str
        A name of the catalogue.

    Returns
    -------
    Law or None
    """
    return next(
        (found for found in LAWS.values() if found.function is None and metric in found.metrics), None
    )
