"""What is a law? A declaration, with a function from a measured curve to the values that theory gives for it."""

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
    """A curve of an analysis, and the analysis, in which a law finds the other numbers that it needs.

    ``curve``: one variable along ``depth`` or ``connection``; its scalar coordinates tell which slice it is.
    ``analysis``: the analysis that it was taken from.
    """

    curve: xr.DataArray
    analysis: xr.Dataset

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The attributes of the run."""
        return {str(name): value for name, value in self.analysis.attrs.items()}

    def label(self, dim: str) -> str:
        """The label at which the curve was selected along a dimension; empty where it never had that dimension."""
        return str(self.curve.coords[dim].item()) if dim in self.curve.coords else ""

    def other(self, name: str, *, over: str = "", **labels: str) -> np.ndarray:
        """The same slice of another variable, along the axis of the curve.

        ``over``: A dimension to leave in, after the axis of the curve.
        ``**labels``: labels of dimensions that the curve does not have, or that replace its own.
        Raises Unavailable: Where the analysis does not contain it, or it is undefined anywhere after the first place.
        """
        if name not in self.analysis:
            raise Unavailable(f"the analysis contains no {name}")
        array = self.analysis[name]
        selection = {
            str(dim): c.item() for dim, c in self.curve.coords.items() if c.ndim == 0 and dim != over
        }
        selection.update(labels)  # after the curve's own, which they replace
        array = array.sel({dim: label for dim, label in selection.items() if dim in array.dims})
        ambiguous = [str(dim) for dim in array.dims if dim not in (*self.curve.dims, over)]
        if ambiguous:
            raise Unavailable(f"the curve does not say which {' and '.join(ambiguous)} it is of")
        values = array.transpose(*self.curve.dims, ...).values.astype(np.float64)
        # The first depth may be undefined: what compares a depth with the one before starts at the second.
        if not np.isfinite(values[1:]).all():
            raise Unavailable(f"{name} is not defined everywhere")
        return values


@dataclass(frozen=True)
class Law:
    """What theory gives for a metric.

    Parameters
    ----------
    name, label : str
        For programs, and for a legend.
    equation : str
        TeX, without dollar signs.
    cite : str
        Key of ``references.bib``.
    assumption : str
        Where it is valid; completes the sentence "It holds for …".
    metrics : tuple of str
        The metrics over whose curves it is drawn.
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


def law(
    *, label: str, equation: str, cite: str, assumption: str, metrics: tuple[str, ...]
) -> Callable[[Callable[[Measured], np.ndarray]], Law]:
    """Declare the function below as a law; the register is ``LAWS`` in theory/catalogue.py.

    Returns: A decorator that turns the function into a `Law` of its name.
    """

    def declare(function: Callable[[Measured], np.ndarray]) -> Law:
        return Law(
            name=function.__name__,
            label=label,
            equation=equation,
            cite=cite,
            assumption=assumption,
            metrics=metrics,
            description=(inspect.getdoc(function) or "").partition("\n")[0],
            function=function,
        )

    return declare
