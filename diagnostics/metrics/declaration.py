"""What is a metric? A declaration, a function of named quantities, and labels that survive the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.quantities import over_sequences, registry
from depthscope.diagnostics.quantities.registry import LABELS, Quantities

Null = Callable[..., xr.DataArray] | float | str

# Why a metric has no value anywhere, where it does not say so itself.
UNDEFINED = "too few tokens, or states that are zero, equal to each other or not finite"

# What a bare array is measured by where the caller names nothing else; a run gives every variant.
PLAIN = {"scope": "sequence", "tokens": "all", "centering": "raw"}


@dataclass(frozen=True)
class Range:
    """The values of a metric in a healthy network.

    Parameters
    ----------
    low, high : float, optional
        Ends, inclusive; None is open.
    source : str
        A key of ``references.bib``, or ``"heuristic"``.

    Examples
    --------
    >>> 1.6 in Range(0.5, 10.0), 3000.0 in Range(0.5, 10.0)
    (True, False)
    """

    low: float | None = None
    high: float | None = None
    source: str = "heuristic"

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called, where it comes from, what it needs; call it on labelled data.

    Parameters
    ----------
    name : str
        The function's name and the variable's name in an analysis.
    symbol : str
        TeX, without dollar signs.
    units : str
        ``"1"`` where it has none.
    healthy : Range or None
        None where no range holds for every network: read it against its null.
    cite : str
        Key of ``references.bib``.
    basis : str
        ``"feature"`` where it moves with a rotation of the features; else ``"stream"`` where it moves with the basis
        of the streams, as each stream and their mean do (of one stream there is but one basis); else
        ``"invariant"``.
    question : str
        The module that answers it.
    description : str
        The first line of the docstring.
    null : function, float or str
        Quantities in, expectation without structure out; or that constant; or the reason why there is none.
    estimator : str
        How the number is taken from tokens and sequences.
    needs : tuple of str
        The quantities, by name, that the function takes.
    function : function
        Quantities in, DataArray out.
    default : bool
        Whether an analysis computes it unasked; false for what costs too much: ask for it by name.
    smooth : bool
        Whether leaving out one sequence at a time tells its standard error; false for counts, extremes,
        quantiles and errors.
    most_tokens : function, optional
        The number of features in, the most tokens that it takes out; None takes all.
    """

    name: str
    symbol: str
    units: str
    healthy: Range | None
    cite: str
    basis: str
    question: str
    description: str
    null: Null
    estimator: str
    needs: tuple[str, ...]
    function: Callable[..., xr.DataArray]
    default: bool = True
    smooth: bool = True
    most_tokens: Callable[[int], int] | None = None

    @property
    def roots(self) -> tuple[str, ...]:
        """The variables of a run that the metric rests on, the mask left out."""
        return registry.roots(self.function)

    def evaluate(self, source: Quantities) -> dict[str, xr.DataArray]:
        """The metric, its ``_null`` and ``_stderr`` where it has them: labelled, stamped, without ``step``.

        Parameters
        ----------
        source : Quantities
            The quantities of one chain.

        Returns
        -------
        dict of str to DataArray

        Raises
        ------
        Unavailable
            Where the run lacks what the metric needs.
        """
        value, stderr = self.measure(source)
        if value.isnull().all():
            value = value.assign_attrs({"undefined_because": UNDEFINED} | value.attrs)
        found = {self.name: self.stamp(value)}
        if callable(self.null):
            null = over_sequences.fold(source.call(self.null))[0]
            found[f"{self.name}_null"] = self.stamp(null, "expected of iid noise")
        if stderr is not None and self.smooth:
            found[f"{self.name}_stderr"] = self.stamp_error(stderr)
        return found

    def measure(self, source: Quantities) -> tuple[xr.DataArray, xr.DataArray | None]:
        """The bare value, and its standard error where it is a mean over sequences.

        Parameters
        ----------
        source : Quantities
            The quantities of one chain.

        Returns
        -------
        tuple of DataArray
            The error is None where sequences are not told apart.
        """
        return over_sequences.fold(source.call(self.function))

    def __call__(
        self, *data: xr.DataArray | xr.Dataset | xr.DataTree, mask: Any = None, **options: Any
    ) -> xr.DataArray:
        """Measure labelled data and keep its labels.

        Parameters
        ----------
        *data : DataArray, Dataset or DataTree
            The arrays of `roots` in that order, or a trace, or a run. A run gives every variant; an array
            gives the plain one: ``scope="sequence"``, ``tokens="all"``, ``center=False``.
        mask : array of bool, optional
            Dims (sample, token), true on real tokens.
        **options : str, bool or arrays
            A label by dimension (``scope="data"``, ``reduction="max"``), ``center=True``, or arrays by name.

        Returns
        -------
        DataArray

        Raises
        ------
        ValueError
            For data or options that the metric does not know.
        """
        labels = _labels(options)
        arrays = {
            name: options.pop(name) for name in list(options) if isinstance(options[name], xr.DataArray)
        }
        if options:
            raise ValueError(
                f"{self.name} got the options {sorted(options)}; it knows center, mask, {', '.join(LABELS)}"
            )
        bare = bool(arrays) or isinstance(data[0] if data else None, xr.DataArray)
        trace, added = self._bind(data, arrays) if bare else (_trace_of(self.name, data), [])
        if mask is not None:
            trace = trace.assign(mask=(("sample", "token"), _mask_values(mask, trace)))
        value = self._measure(trace, PLAIN | labels if bare else labels, labels)
        return value.squeeze([dim for dim in added if dim in value.dims])

    def _measure(
        self, trace: xr.Dataset, labels: Mapping[str, str], asked: Mapping[str, str]
    ) -> xr.DataArray:
        chosen = {dim: label for dim, label in labels.items() if dim in registry.CHOICES}
        value = self.evaluate(Quantities(trace, choices=chosen))[self.name]
        foreign = sorted(set(asked) - set(value.dims))
        if foreign:
            raise ValueError(
                f"{self.name} has no {', '.join(foreign)}; its dims are {', '.join(map(str, value.dims))}"
            )
        return value.sel({dim: label for dim, label in labels.items() if dim in value.dims})

    def _bind(self, data: tuple[Any, ...], named: Mapping[str, xr.DataArray]) -> tuple[xr.Dataset, list[str]]:
        free = [root for root in self.roots if root not in named]
        if len(data) != len(free) or not set(named) <= set(self.roots):
            raise ValueError(
                f"{self.name} got {len(data) + len(named)} arrays; expected {', '.join(self.roots)}, or a run"
            )
        arrays = dict(zip(free, data, strict=True)) | dict(named)
        dims = {dim for array in arrays.values() for dim in array.dims}
        whole = {name: _with_dims(array, name, self.name) for name, array in arrays.items()}
        added = sorted({str(dim) for array in whole.values() for dim in array.dims} - set(map(str, dims)))
        return xr.Dataset({name: array.rename(name) for name, array in whole.items()}), added

    def stamp(self, value: xr.DataArray, what: str = "") -> xr.DataArray:
        """Write what the declaration knows on a variable.

        Parameters
        ----------
        value : DataArray
            A value of the metric.
        what : str
            What it is, where it is not the metric itself.

        Returns
        -------
        DataArray
        """
        facts: dict[str, str | float] = {
            "long_name": f"{self.description.rstrip('.')}{', ' if what else ''}{what}",
            "units": self.units,
            "symbol": self.symbol,
            "references": self.cite,
            "estimator": self.estimator,
            "basis": self.basis,
            "question": self.question,
        }
        if not (callable(self.null) or what):
            facts["null"] = self.null
        return value.assign_attrs(facts).rename(self.name)

    def stamp_error(self, error: xr.DataArray) -> xr.DataArray:
        """Write on a standard error what it is of, and how it was estimated.

        Parameters
        ----------
        error : DataArray
            A standard error; its attribute ``estimator`` is kept.

        Returns
        -------
        DataArray
        """
        how = error.attrs.get("estimator", "standard deviation over sequences by the root of their number")
        return self.stamp(error, "standard error over sequences").assign_attrs(estimator=how)


def metric(
    *,
    symbol: str,
    cite: str,
    basis: str,
    null: Null,
    estimator: str,
    units: str = "1",
    healthy: Range | None = None,
    default: bool = True,
    smooth: bool = True,
    most_tokens: Callable[[int], int] | None = None,
) -> Callable[[Callable[..., xr.DataArray]], Metric]:
    """Declare the function below as a metric; its parameters name the quantities that it needs.

    Parameters
    ----------
    symbol, cite, basis, null, estimator, units, healthy, default, smooth, most_tokens
        See `Metric`.

    Returns
    -------
    function
        A decorator that makes a `Metric`.
    """

    def declare(function: Callable[..., xr.DataArray]) -> Metric:
        declared = Metric(
            name=function.__name__,
            symbol=symbol,
            units=units,
            healthy=healthy,
            cite=cite,
            basis=basis,
            question=function.__module__.rpartition(".")[2],
            description=(inspect.getdoc(function) or "").partition("\n")[0],
            null=null,
            estimator=estimator,
            needs=tuple(inspect.signature(function).parameters),
            function=function,
            default=default,
            smooth=smooth,
            most_tokens=most_tokens,
        )
        object.__setattr__(declared, "__doc__", inspect.getdoc(function))
        return declared

    return declare


def _labels(options: dict[str, Any]) -> dict[str, str]:
    """Take the labels out of the options: one by dimension, and ``center``."""
    labels = {
        dim: options.pop(dim)
        for dim in LABELS
        if dim in options and not isinstance(options[dim], xr.DataArray)
    }
    if "center" in options:
        labels["centering"] = "centred" if options.pop("center") else "raw"
    for dim, label in labels.items():
        if label not in LABELS[dim]:
            raise ValueError(f"{dim} is {label!r}; expected one of {', '.join(map(repr, LABELS[dim]))}")
    return labels


def _trace_of(name: str, data: tuple[Any, ...]) -> xr.Dataset:
    """The trace of a run, of a node of it, or the dataset that already is one."""
    if len(data) != 1 or not isinstance(data[0], xr.Dataset | xr.DataTree):
        kinds = ", ".join(type(item).__name__ for item in data) or "nothing"
        raise ValueError(f"{name} got {kinds}; expected labelled arrays, a trace or a run")
    if isinstance(data[0], xr.Dataset):
        return data[0]
    run = data[0]
    tree = run.children.get("trace", run)
    if tree.children:
        raise ValueError(
            f"{name} got several chains: {', '.join(tree.children)}; choose one, such as run['trace/NAME']"
        )
    beside = run.children.get("statistics")
    return registry.sources(tree.to_dataset(), None if beside is None else beside.to_dataset())


def _with_dims(array: xr.DataArray, root: str, name: str) -> xr.DataArray:
    """The array with every dim of its variable, those that it lacks with size 1."""
    dims = (schema.TRACE | schema.STATISTICS)[root].dims
    unknown = [str(dim) for dim in array.dims if dim not in dims]
    if unknown:
        raise ValueError(
            f"{name} got {root} with the dims {', '.join(unknown)}; expected some of {', '.join(dims)}"
        )
    missing = [dim for dim in dims if dim not in array.dims]
    return array.expand_dims(missing).transpose(*dims)


def _mask_values(mask: Any, trace: xr.Dataset) -> Any:
    """The mask on (sample, token) of a trace."""
    sizes = (trace.sizes["sample"], trace.sizes["token"])
    values = np.asarray(
        mask.transpose("sample", "token")
        if getattr(mask, "ndim", 0) == 2 and isinstance(mask, xr.DataArray)
        else mask
    )
    if values.dtype != bool or values.size != np.prod(sizes):
        raise ValueError(f"mask has shape {values.shape} and dtype {values.dtype}; expected booleans {sizes}")
    return values.reshape(sizes)
