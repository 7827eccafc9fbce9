"""What is a metric? A declaration, a function of named quantities, and labels that are the same before and after."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.labelled_input import bind_arrays, split_options, trace_of, with_mask

# Importing the modules of quantities declares these, so that a metric finds them whichever files are imported before it.
from depthscope.diagnostics.quantities import (  # noqa: F401
    depth_paths,
    mixing_matrices,
    over_sequences,
    registry,
    states,
    token_spectra,
    tokens,
)
from depthscope.diagnostics.quantities.registry import DIMS, Quantities

Values = xr.Variable | xr.DataArray
"""What a formula gives: an array with named dims; the labels that it lacks are put on afterwards."""
Stamped = TypeVar("Stamped", xr.Variable, xr.DataArray)
Null = Callable[..., Values] | float | str
Function = Callable[..., Values]
"""Quantities in, the value out."""

# Dims that a figure is drawn along, the first that a metric has.
AXES = ("depth", "connection", "weight", "component")
SCALES = ("linear", "log")
BASES = ("invariant", "stream", "feature")
DIRECTIONS = ("", "higher", "lower", "nearer 1")

OURS = "this project"
"""Source of a limit or a definition that no publication states."""

# Why a metric has no value anywhere, where its function gives no reason.
UNDEFINED = "too few tokens, or states that are zero, equal to each other or not finite"

# The variant of a metric called on an array without options; a run gives all.
PLAIN = {"scope": "sequence", "tokens": "all", "centering": "raw"}


@dataclass(frozen=True)
class Range:
    """The values of a metric in a healthy network.

    Parameters
    ----------
    low, high : float, optional
        Ends, inclusive; None is open.
    source : str
        A key of ``references.bib``, or ``"this project"``.

    Examples
    --------
    >>> 1.6 in Range(0.5, 10.0), 3000.0 in Range(0.5, 10.0)
    (True, False)
    """

    low: float | None = None
    high: float | None = None
    source: str = OURS

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Metric:
    """One metric: its name, its source and what it needs; call it on labelled data.

    Everything that a table, a figure, a page of the docs or a test over all metrics has to know is stated here.

    Parameters
    ----------
    name : str
        The function's name and the variable's name in an analysis.
    symbol : str
        TeX, without dollar signs.
    dims : tuple of str
        Dims of the value of one training step, in the order of an analysis; with several streams, or of a family that
        can feed it.
    label : str
        Short name for a column or an axis; the function's name with spaces by default.
    scale : str
        ``"log"`` where values spread over orders of magnitude and are positive, else ``"linear"``.
    units : str
        ``"1"`` where it has none.
    healthy : Range or None
        None where no range fits every network: compare with the null.
    cite : str
        Key of ``references.bib``.
    basis : str
        ``"feature"`` where it changes with a rotation of the features; else ``"stream"`` where it changes with the
        basis of the streams, as each stream and their mean do (one stream has only one basis); else
        ``"invariant"``.
    question : str
        The module that defines the function, without its package: ``function.__module__`` is where it is declared.
        The module's docstring is the question, see `question_text`.
    description : str
        The first line of the docstring.
    null : function, float or str
        Quantities in, expectation without structure out; or that constant; or the reason why there is none.
    null_error : float
        Largest relative error of the null as the mean over finite samples of noise, as where it is a limit of large
        matrices or drawn once; 0 where it is exact.
    null_cite : str
        Key of ``references.bib`` for the law that gives the null; empty where it needs none.
    estimator : str
        How the number is computed from tokens and sequences.
    needs : tuple of str
        The quantities, by name, that the function takes.
    function : function
        Quantities in, an array with named dims out.
    headline : bool
        Whether a table for print, which has room for a few columns only, includes it.
    smooth : bool
        Whether the jackknife estimates its standard error; false for counts, extremes, quantiles and errors.
    most_tokens : function, optional
        The number of features in, the largest number of tokens that it uses out; None uses all.
    of_sequences : bool
        Whether it compares tokens of one sequence, or sequences: a sample of single tokens does not give it.
    of_steps : bool
        Whether the value at a depth compares it with the depth before: NaN at the first.
    infinite : bool
        Whether ±∞ is a value (the logarithm of zero, the condition of a singular matrix), not only an overflow.
    per_step : bool
        Whether it can change during training; false for facts about the sample.
    better : str
        Which of two networks passes its signal better: ``"higher"``, ``"lower"``, ``"nearer 1"``; empty where the number
        alone does not say.
    """

    name: str
    symbol: str
    dims: tuple[str, ...]
    label: str
    cite: str
    basis: str
    question: str
    description: str
    null: Null
    estimator: str
    needs: tuple[str, ...]
    function: Function
    scale: str = "linear"
    units: str = "1"
    healthy: Range | None = None
    null_cite: str = ""
    null_error: float = 0.0
    headline: bool = False
    smooth: bool = True
    most_tokens: Callable[[int], int] | None = None
    of_sequences: bool = False
    of_steps: bool = False
    infinite: bool = False
    per_step: bool = True
    better: str = ""

    @property
    def title(self) -> str:
        """The description up to its first colon or semicolon: a title for a figure."""
        return re.split(r"[:;]", self.description)[0].rstrip(".")

    @property
    def question_text(self) -> str:
        """The first line of the docstring of the module that defines the function."""
        return (sys.modules[self.function.__module__].__doc__ or "").partition("\n")[0]

    @property
    def axis(self) -> str:
        """The dim to draw it along: ``depth``, ``connection``, ``weight`` or ``component``."""
        # There is one: `_check_declaration` refuses a metric without.
        return next(dim for dim in AXES if dim in self.dims)

    @property
    def pairwise(self) -> bool:
        """Whether it is a matrix along `axis` and ``other_`` `axis`, such as CKA of every two depths."""
        return f"other_{self.axis}" in self.dims

    @property
    def roots(self) -> tuple[str, ...]:
        """The variables of a run that the metric is computed from, without the mask."""
        return registry.roots(self.function)

    def evaluate(self, source: Quantities) -> dict[str, xr.Variable]:
        """The metric of one chain, its ``_null`` and ``_stderr`` where it has them, with attributes and without ``step``.

        Raises Unavailable: Where the run lacks what the metric needs.
        """
        value, stderr = self.measure(source)
        found = {self.name: self.stamp(value)}
        # A metric that knows a closer reason has stated it, as those of streamed sums do.
        if np.isnan(value.values).all():
            found[self.name].attrs.setdefault("undefined_because", UNDEFINED)
        if callable(self.null):
            # Folded like the value: sequences of different lengths have different nulls, of which the mean is taken too.
            null = self._folded(source, self.null)[0]
            found[f"{self.name}_null"] = self.stamp(null, "expected of iid noise")
        # Counts and extremes vary over sequences too, but that spread does not estimate their error.
        if stderr is not None and self.smooth:
            found[f"{self.name}_stderr"] = self.stamp_error(stderr)
        return found

    def unfolded(self, source: Quantities) -> xr.DataArray:
        """What the function measures, labelled: of each sequence where it has a value of each."""
        return source.labelled(source.variable(self.function))

    def measure(self, source: Quantities) -> tuple[xr.Variable, xr.Variable | None]:
        """The value without attributes, and its standard error; None where there is no value of each sequence."""
        return self._folded(source, self.function)

    @staticmethod
    def _folded(source: Quantities, function: Function) -> tuple[xr.Variable, xr.Variable | None]:
        value = source.variable(function)
        return over_sequences.fold(value, source.scopes if "group" in value.dims else None)

    def __call__(
        self, *data: xr.DataArray | xr.Dataset | xr.DataTree, mask: Any = None, **options: Any
    ) -> xr.DataArray:
        """Measure labelled data; the result has its labels.

        Parameters
        ----------
        *data : DataArray, Dataset or DataTree
            The arrays of `roots` in that order, or a trace, or a run. A run gives every variant; arrays
            give the plain one: ``scope="sequence"``, ``tokens="all"``, ``center=False``.
        mask : array of bool, optional
            Dims (sample, token), true on real tokens.
        **options : str, bool or arrays
            A label by dimension (``scope="data"``, ``reduction="max"``), ``center=True``, or arrays by name.

        Returns
        -------
        DataArray

        Raises
        ------
        InputError
            For data or options that the metric does not know.
        """
        requested, arrays = split_options(self.name, options)
        added: list[str] = []
        labels = dict(requested)
        if arrays or (data and isinstance(data[0], xr.DataArray)):
            others = registry.alternatives(self.function)
            # By name alone: the order does not show which of the alternatives an array is.
            names = tuple(arrays) if not data and set(arrays) <= set(others) else self.roots
            trace, added = bind_arrays(self.name, names, data, arrays)
            labels = {**PLAIN, **requested}
        else:
            trace = trace_of(self.name, data)
        if mask is not None:
            trace = with_mask(trace, mask)
        # Only the wanted variant is computed: a spectrum centred and raw costs twice as much.
        choices = {dim: label for dim, label in labels.items() if dim in registry.CHOICES}
        source = Quantities(trace, choices=choices)
        value = source.labelled(self.evaluate(source)[self.name]).rename(self.name)
        foreign = sorted(set(requested) - set(value.dims))
        if foreign:
            raise InputError(
                f"{self.name} has no {', '.join(foreign)}; its dims are {', '.join(map(str, value.dims))}"
            )
        value = value.sel({dim: label for dim, label in labels.items() if dim in value.dims})
        # Dims that were added for the quantities, and that no array of the caller has.
        return value.squeeze([dim for dim in added if dim in value.dims])

    def stamp(self, value: Stamped, what: str = "") -> Stamped:
        """The value with the declaration in its attributes; ``what`` it is, where it is not the metric itself."""
        found = value.copy(deep=False)
        found.attrs = {**value.attrs, **self.facts(what)}
        return found

    def facts(self, what: str = "") -> dict[str, str | float]:
        """The declaration of a variable, as its attributes; ``what`` as of `stamp`."""
        facts: dict[str, str | float] = {
            "long_name": f"{self.description.rstrip('.')}{', ' if what else ''}{what}",
            "units": self.units,
            "symbol": self.symbol,
            "references": self.cite,
            "estimator": self.estimator,
            "basis": self.basis,
            "question": self.question,
        }
        # A null that is computed is a variable of its own; a null or an error has none.
        if not (callable(self.null) or what):
            facts["null"] = self.null
        return facts

    def stamp_error(self, error: xr.Variable) -> xr.Variable:
        """The standard error with what it is of in its attributes; an attribute ``estimator`` is not overwritten."""
        how = error.attrs.get("estimator", "standard deviation over sequences by the root of their number")
        found = self.stamp(error, "standard error over sequences")
        found.attrs["estimator"] = how
        return found


def metric(*, dims: str, label: str = "", **stated: Any) -> Callable[[Function], Metric]:
    """Declare the function below as a metric; its parameters name the quantities that it needs.

    Parameters
    ----------
    dims : str
        As `Metric.dims`, separated by spaces.
    label : str
        As `Metric.label`.
    **stated
        Other fields of `Metric`: symbol, cite, basis, null and estimator, and those that are not the default.

    Returns
    -------
    function
        A decorator that makes a `Metric`.
    """

    def declare(function: Function) -> Metric:
        name, doc = function.__name__, inspect.getdoc(function) or ""
        declared = Metric(
            name=name,
            dims=tuple(dims.split()),
            label=label or name.replace("_", " "),
            question=function.__module__.rpartition(".")[2],
            description=doc.partition("\n")[0],
            needs=tuple(inspect.signature(function).parameters),
            function=function,
            **stated,
        )
        _check_declaration(declared)
        # help() and sphinx show the docstring of the function; the dataclass is frozen.
        object.__setattr__(declared, "__doc__", doc)
        return declared

    return declare


def _check_declaration(declared: Metric) -> None:
    name, dims = declared.name, declared.dims
    # −1 keeps an unknown dim from raising here: the message below names all that are expected.
    ordered = tuple(sorted(dims, key=lambda dim: DIMS.index(dim) if dim in DIMS else -1))
    if not set(AXES) & set(dims) or dims != ordered or not set(dims) <= set(DIMS):
        raise InputError(
            f"metric {name} has dims={' '.join(dims)!r}; expected one of {', '.join(AXES)} and others, in this order: "
            f"{' '.join(DIMS)} (step is added by the analysis)"
        )
    stated = (
        ("scale", declared.scale, SCALES),
        ("basis", declared.basis, BASES),
        ("better", declared.better, DIRECTIONS),
    )
    for field, value, allowed in stated:
        if value not in allowed:
            raise InputError(f"metric {name} has {field}={value!r}; expected one of {', '.join(allowed)}")
