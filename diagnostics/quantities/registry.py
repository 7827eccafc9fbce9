"""What do metrics share? Quantities derived from a trace, each declared once and computed at most once.

A quantity is a function; the names of its parameters are the other quantities, variables of the trace or choices of
labels that it needs. Values are arrays with named dims (`xarray.Variable`): labels cost more than most formulas, and are put
on at the end, by `Quantities.labelled`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema import (
    COEFFICIENTS,
    OF_ATTENTION,
    OF_STREAMS,
    OF_WEIGHTS,
    POOLED_STEP,
    STATISTICS,
    TRACE,
    TRACE_COORDS,
)

CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("sequence", "data"),
    "tokens": ("all", "ordinary"),
    "centering": ("raw", "centred"),
    "estimator": ("biased", "unbiased"),
}
"""Labels by dim, where a metric may be computed for one label only, to save time."""

LABELS: dict[str, tuple[str, ...]] = CHOICES | {
    "direction": ("forward", "backward"),
    "reduction": ("mean", "median", "p1", "p99", "max"),
    "kind": ("row", "column", "negativity"),
    "norm": ("infinity", "one", "two"),
}
"""Labels by dim, for every dim of an analysis whose labels do not depend on the run."""

DIMS = (
    *("estimator", "direction", "norm", "kind", "scope", "tokens", "centering", "depth"),
    *("other_depth", "connection", "other_connection", "weight"),
    *("component", "order", "stream", "head", "quantile", "reduction"),
)
"""The dims of an analysis in their order, after ``step``; a metric has those that it declares."""

FACTS = (
    "family",
    "proof",
    "constraint",
    "untouched",
    "untouched_blocks",
    "equal_blocks",
)
"""Attributes of a run that its quantities and its analysis depend on; those of a chain's own trace win."""

ROW_FACTS = ("untouched",)
"""Those of them that change with the weights: in a training every row has its own, as a number of the same name."""

ATTRS = "attrs"
"""The quantity of this name is the attributes of the chain: its family, and whether its reading is proven."""

# What to do where a run lacks a variable.
_REMEDIES = {
    "gradient": "capture it with gradients=True; a network whose trunk is frozen has none at its states",
    **{of.name: of.remedy for of in COEFFICIENTS if of.remedy},
    **dict.fromkeys(
        OF_ATTENTION,
        "no forward showed attention weights that could be read, see /coverage",
    ),
    **dict.fromkeys(OF_WEIGHTS, "record it with ds.record(model, weights=True)"),
    **dict.fromkeys(
        ("weight_first_square_distance", "weight_first_square_norm"),
        "it is of one checkpoint; make a history of several with depthscope probe step-*/",
    ),
}


class Unavailable(InputError):
    """A quantity that cannot be computed from the run, with the reason."""


class Quantities:
    """The quantities of one chain: variables of its trace and what is derived from them, on demand.

    ``trace``: the chain's trace.
    ``choices``: one label for some of `CHOICES`, where not every variant is wanted.
    ``supplied``: quantities that are known otherwise than from raw states, such as from sums over every token:
    functions like those of `QUANTITIES`, which take their place.

    Examples
    --------
    The names of a function's parameters are what it needs:

    >>> trace = xr.Dataset({"mask": (("sample", "token"), [[True, True, False]])})
    >>> Quantities(trace).call(lambda mask: int(mask.sum()))
    2
    """

    def __init__(
        self,
        trace: xr.Dataset,
        *,
        choices: Mapping[str, str] | None = None,
        supplied: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        self.trace = trace
        self._supplied = supplied
        # A choice is a quantity too: a function that names the dim gets the labels to compute.
        self._values: dict[str, Any] = dict(CHOICES)
        self._values[ATTRS] = trace.attrs
        for dim, label in (choices or {}).items():
            self._values[dim] = (label,)
        self._reasons: dict[str, str] = {}
        self._coordinates: dict[tuple[tuple[Any, int], ...], xr.Coordinates] = {}
        self._own: dict[Any, np.ndarray] = {}  # labels by dim, that values had

    def __getitem__(self, name: str) -> Any:
        # A failure is cached too: many metrics need the same quantity, and some fail only after minutes of work.
        if name in self._reasons:
            raise Unavailable(self._reasons[name])
        if name not in self._values:
            try:
                self._values[name] = self._compute(name)
            except Unavailable as reason:
                self._reasons[name] = str(reason)  # without its traceback, which has all that was computed
                raise
        return self._values[name]

    def give(self, name: str, value: Any) -> None:
        """Give a quantity that is known already, such as from more data than the trace has."""
        self._values[name] = value

    def call(self, function: Callable[..., Any]) -> Any:
        """Call a function with the quantities that its parameters name.

        ``function``: its parameters are names of quantities; those with a default are left out where they are not
        available.
        """
        # Of a method without its owner: so that nobody keeps that.
        parameters = _parameters(getattr(function, "__func__", function))
        arguments = {}
        for name, is_needed in parameters[1:] if inspect.ismethod(function) else parameters:
            try:
                arguments[name] = self[name]
            except Unavailable:
                if is_needed:
                    raise
        return function(**arguments)

    def variable(self, function: Callable[..., Any]) -> xr.Variable:
        """What a metric's function gives, without labels."""
        return self.unlabelled(self.call(function))

    def unlabelled(self, value: xr.Variable | xr.DataArray) -> xr.Variable:
        """Values without labels; those that they have are noted, for `coordinates`."""
        if not isinstance(value, xr.DataArray):
            return value
        self._own |= {str(dim): value[dim].values for dim in value.dims if dim in value.indexes}
        return value.variable

    @property
    def scopes(self) -> np.ndarray:
        """Of each group of tokens, whether it is one sequence or all data."""
        counts = {"sequence": self["mask"].sizes["sample"], "data": 1}
        return np.array([label for label in self._values["scope"] for _ in range(counts[label])])

    def coordinates(self, sizes: Mapping[Any, int]) -> xr.Coordinates:
        """The labels of the chain on some dims."""
        key = tuple(sizes.items())
        if key not in self._coordinates:  # to make indexes takes longer than to use them
            found: dict[str, Any] = {}
            for dim, size in key:
                found |= self._labels(str(dim), size)
                own = self._own.get(dim, ())
                found |= {dim: own} if len(own) == size else {}
            self._coordinates[key] = xr.Coordinates(found)
        return self._coordinates[key]

    def labelled(self, value: xr.Variable) -> xr.DataArray:
        """Values with the labels of the chain on every dim."""
        return xr.DataArray(value, self.coordinates(value.sizes))

    def _labels(self, dim: str, size: int) -> dict[str, Any]:
        """Coordinates of a dim of a value."""
        if dim in CHOICES:
            return {dim: list(self._values[dim])}
        if dim in LABELS:
            return {dim: list(LABELS[dim])}
        if dim in ("component", "head"):
            return {dim: np.arange(size)}
        if dim == "group":
            return {"scope": ("group", self.scopes)}
        if dim == "stream":
            return {dim: stream_labels(size, self.trace.sizes.get("stream", 1))}
        if dim.startswith("other_"):
            of_axis = self.trace.coords.get(dim.removeprefix("other_"))
            return {dim: np.arange(size) if of_axis is None else np.asarray(of_axis.values)}
        known = {str(name): of.variable for name, of in self.trace.coords.items() if of.dims == (dim,)}
        return ({dim: np.arange(size)} if dim == "connection" else {}) | known

    def _compute(self, name: str) -> Any:
        if name in self._supplied:
            return self.call(self._supplied[name])
        if name in QUANTITIES:
            return self.call(QUANTITIES[name])
        if name in self.trace.variables:
            return self.trace[name]
        if name == "mask":
            # A bare array measured by name has no mask: every token is real.
            sizes = {dim: self.trace.sizes.get(dim, 1) for dim in TRACE["mask"].dims}
            return xr.DataArray(np.ones(tuple(sizes.values()), dtype=bool), dims=tuple(sizes))
        if name not in (*TRACE, *TRACE_COORDS, *STATISTICS):
            # Not Unavailable, which is a reason about the run: this is a mistake in a declaration.
            raise LookupError(f"no quantity {name!r}; declare it with @quantity or record it in the trace")
        if name in OF_STREAMS and self.trace.sizes.get("stream") == 1:
            raise Unavailable("needs more than one stream; this run has one")
        raise missing(name)


@lru_cache(maxsize=1024)
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, bool], ...]:
    """Names of parameters, and whether each has no default."""
    found = inspect.signature(function).parameters.items()
    return tuple((name, of.default is inspect.Parameter.empty) for name, of in found)


def stream_labels(size: int, num_streams: int) -> list[str]:
    """Labels of the views of so many streams: ``mean`` and, of several, their numbers; shares of streams have no mean."""
    numbers = list(map(str, range(num_streams))) if num_streams > 1 else []
    return numbers if size == len(numbers) else ["mean", *numbers]


def with_attrs(value: xr.Variable, attrs: Mapping[str, Any]) -> xr.Variable:
    """The same values with further attributes."""
    found = value.copy(deep=False)
    found.attrs = {**value.attrs, **attrs}
    return found


Values = TypeVar("Values", xr.Variable, xr.DataArray)


def ratio(numerator: Values, denominator: Values) -> Values:
    """The ratio of two values; NaN where the denominator is not positive."""
    # By numpy: `where` takes longer than all of the rest.
    positive = np.where(denominator.values > 0, denominator.values, np.nan)
    if numerator.dims == denominator.dims:
        return numerator.copy(data=numerator.values / positive)
    return numerator / denominator.copy(data=positive)


def missing(name: str) -> Unavailable:
    """The reason where a run lacks a variable, with what to do."""
    remedy = f": {_REMEDIES[name]}" if name in _REMEDIES else ""
    return Unavailable(f"the run has no {name}{remedy}")


def sources(trace: xr.Dataset, statistics: xr.Dataset | None) -> xr.Dataset:
    """The variables that metrics are computed from: a trace, and of the statistics the last step of some.

    ``statistics``: the chain's statistics, where the run has some.
    """
    if statistics is None:
        return trace
    known = [name for name in OF_WEIGHTS if name in statistics]
    # Of a live store the trace may be of an earlier step than the last row.
    pooled = statistics.attrs.get(POOLED_STEP)
    rows = [] if pooled is None else np.flatnonzero(statistics["step"].values == pooled).tolist()
    row = rows[0] if rows else -1
    return trace.assign({name: statistics[name].isel(step=row, drop=True) for name in known})


def with_facts(trace: xr.Dataset, attrs: Mapping[Any, Any]) -> xr.Dataset:
    """A trace with the run's attributes about all of its chains, where the chain has none of its own."""
    return trace.assign_attrs(
        {name: attrs[name] for name in FACTS if name in attrs and name not in trace.attrs}
    )


def with_row_facts(analysis: xr.Dataset) -> xr.Dataset:
    """An analysis of one step with its row's values of the weights at that step, in place of what holds at another one."""
    # Of a row of a training that lacks one of them, its weights have left their start.
    known = [name for name in ROW_FACTS if name in analysis]
    if not known:
        return analysis
    attrs = {name: value for name, value in analysis.attrs.items() if name not in ROW_FACTS}
    for name in known:
        value = float(analysis[name])
        if value == value:  # no NaN
            attrs[name] = value
    found = analysis.drop_vars(known)
    found.attrs = attrs
    return found


QUANTITIES: dict[str, Callable[..., Any]] = {}
"""Derived quantities by name, of every module that was imported; metrics are looked up by name, not by order."""


_ROOTS: dict[str, tuple[str, ...]] = {}
"""The roots of quantities that state them, by name."""


def quantity(function: Callable[..., Any] | None = None, *, roots: tuple[str, ...] = ()) -> Any:
    """Declare a derived quantity under the function's name.

    ``function``: its parameters name the quantities that it needs; one with a default of None is taken where the run
    has it.
    ``roots``: where it is computed from whichever of several variables a run has: those that stand for it, see `roots`.
    """
    if function is None:
        return lambda declared: quantity(declared, roots=roots)
    name = function.__name__
    known = QUANTITIES.get(name)
    # The same function again is a module that is reloaded in a notebook.
    if known is not None and (known.__module__, known.__qualname__) != (
        function.__module__,
        function.__qualname__,
    ):
        raise InputError(
            f"the quantity {name!r} is declared in {known.__module__} already: choose another name"
        )
    QUANTITIES[name] = function
    if roots:
        _ROOTS[name] = roots
    return function


def roots(
    function: Callable[..., Any], supplied: Mapping[str, Callable[..., Any]] = MappingProxyType({})
) -> tuple[str, ...]:
    """The variables of a trace that a function is computed from in the end, without the mask.

    ``supplied``: as of `Quantities`: then these are variables of what supplies them, and of the trace.
    """
    # Without the mask: nearly all take it, and a bare array has none.
    found: list[str] = []
    for name in inspect.signature(function).parameters:
        if name in supplied:
            found += roots(supplied[name], supplied)
        elif name in _ROOTS:
            found += _ROOTS[name]
        elif name in QUANTITIES:
            found += roots(QUANTITIES[name], supplied)
        elif name not in (*CHOICES, ATTRS, "mask"):
            found.append(name)
    return tuple(dict.fromkeys(found))


def alternatives(function: Callable[..., Any]) -> tuple[str, ...]:
    """The variables of a trace from which a function may be computed in place of its `roots`."""
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in QUANTITIES:
            found += alternatives(QUANTITIES[name])
        elif parameter.default is None and name in TRACE:
            found.append(name)
    return tuple(dict.fromkeys(found))
