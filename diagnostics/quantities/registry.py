"""What do metrics share? Quantities derived from a trace, each declared once and computed at most once.

A quantity is a function; the names of its parameters say which other quantities, variables of the trace or
choices of labels it rests on. See `quantities.states` and `quantities.mixing_matrices` for those of a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema

CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("sequence", "data"),
    "tokens": ("all", "ordinary"),
    "centering": ("raw", "centred"),
    "estimator": ("biased", "unbiased"),
}
LABELS: dict[str, tuple[str, ...]] = CHOICES | {
    "direction": ("forward", "backward"),
    "reduction": ("mean", "median", "p1", "p99", "max"),
    "kind": ("row", "column", "negativity"),
    "norm": ("infinity", "one", "two"),
}

DIMS = (
    *("estimator", "direction", "norm", "kind", "scope", "tokens", "centering", "depth"),
    *("other_depth", "connection", "other_connection", "weight"),
    *("component", "order", "stream", "quantile", "reduction"),
)
"""The dims of an analysis in their order, after ``step``; a metric has those that it declares."""

_REMEDIES = {
    "gradient": "capture it with gradients=True",
    "h_res": "one stream mixes nothing, or the family's mixing matrix is not known",
    "h_pre": "the family has no scalar read weights, or the capture left them out",
    "h_post": "the family has no scalar write weights, or the capture left them out",
    "initial_logits": "add them with diagnostics.with_replay(run, probes.initial_logits(checkpoint), decay=…)",
    **dict.fromkeys(schema.OF_WEIGHTS, "record it with probes.record(model, weights=True)"),
    **dict.fromkeys(schema.OF_STREAMING, "capture it with streaming=True"),
}


class Unavailable(ValueError):
    """A quantity that the run cannot give, with the reason."""


class Quantities:
    """The quantities of one chain: variables of its trace and what is derived from them, on demand.

    Parameters
    ----------
    trace : Dataset
        The chain's trace.
    choices : mapping of str to str, optional
        One label for some of `CHOICES`, where not every variant is wanted.

    Examples
    --------
    A function's parameter names say what it needs:

    >>> trace = xr.Dataset({"mask": (("sample", "token"), [[True, True, False]])})
    >>> Quantities(trace).call(lambda mask: int(mask.sum()))
    2
    """

    def __init__(self, trace: xr.Dataset, *, choices: Mapping[str, str] | None = None) -> None:
        self.trace = trace
        self._values: dict[str, Any] = dict(CHOICES) | {
            dim: (label,) for dim, label in (choices or {}).items()
        }
        self._reasons: dict[str, Unavailable] = {}

    def __getitem__(self, name: str) -> Any:
        if name in self._reasons:
            raise self._reasons[name]
        if name not in self._values:
            try:
                self._values[name] = self._compute(name)
            except Unavailable as reason:
                self._reasons[name] = reason
                raise
        return self._values[name]

    @property
    def computed(self) -> set[str]:
        """Names of the derived quantities that were needed so far."""
        return {name for name in self._values if name in QUANTITIES}

    def call(self, function: Callable[..., Any]) -> Any:
        """Call a function with the quantities that its parameters name.

        Parameters
        ----------
        function : function
            Its parameters are names of quantities.

        Returns
        -------
        object
            What the function returns.
        """
        return function(**{name: self[name] for name in inspect.signature(function).parameters})

    def _compute(self, name: str) -> Any:
        if name in QUANTITIES:
            return self.call(QUANTITIES[name])
        if name in self.trace.variables:
            return self.trace[name]
        if name == "mask":
            sizes = {dim: self.trace.sizes.get(dim, 1) for dim in schema.TRACE["mask"].dims}
            return xr.DataArray(np.ones(tuple(sizes.values()), dtype=bool), dims=tuple(sizes))
        if name not in (*schema.TRACE, *schema.OF_WEIGHTS, *schema.OF_STREAMING):
            raise LookupError(f"no quantity {name!r}; declare it with @quantity or record it in the trace")
        remedy = _REMEDIES.get(name)
        raise Unavailable(f"the run holds no {name}" + (f": {remedy}" if remedy else ""))


def sources(trace: xr.Dataset, statistics: xr.Dataset | None) -> xr.Dataset:
    """What metrics rest on: a trace, and beside it what the statistics say at last about the weights and of every token.

    Parameters
    ----------
    trace : Dataset
        The chain's trace.
    statistics : Dataset or None
        The chain's statistics, where the run holds some.

    Returns
    -------
    Dataset
    """
    if statistics is None:
        return trace
    known = [name for name in (*schema.OF_WEIGHTS, *schema.OF_STREAMING) if name in statistics]
    return trace.assign(
        {name: statistics[name].isel(step=-1, drop=True, missing_dims="ignore") for name in known}
    )


QUANTITIES: dict[str, Callable[..., Any]] = {}


def quantity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a derived quantity under the function's name.

    Parameters
    ----------
    function : function
        Its parameters name the quantities that it rests on.

    Returns
    -------
    function
        The same function.
    """
    QUANTITIES[function.__name__] = function
    return function


def roots(function: Callable[..., Any]) -> tuple[str, ...]:
    """The variables of a trace that a function rests on in the end, the mask left out.

    Parameters
    ----------
    function : function
        Its parameters name quantities.

    Returns
    -------
    tuple of str
        In the order in which they are met.
    """
    found: dict[str, None] = {}
    for name in inspect.signature(function).parameters:
        if name in QUANTITIES:
            found |= dict.fromkeys(roots(QUANTITIES[name]))
        elif name not in CHOICES and name != "mask":
            found[name] = None
    return tuple(found)
