"""What can be said about a run? Every metric that its trace can feed, and why one is missing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from diagnostics import schema
from diagnostics.catalogue import CATALOGUE
from diagnostics.curves import training_curves
from diagnostics.metric import Metric
from diagnostics.quantities import Quantities, Unavailable, sources

Progress = Callable[[str, int, int], None]


def analyze(
    run: xr.DataTree, *, metrics: Iterable[str] | None = None, progress: Progress | None = None
) -> xr.Dataset | xr.DataTree:
    """Measure a run with every metric of the catalogue that it can feed.

    Parameters
    ----------
    run : DataTree
        A run with a trace; one that holds only statistics gives its training curves.
    metrics : iterable of str, optional
        Names of `CATALOGUE`; by default all but the costly ones (``Metric.default`` is false). Nothing is
        computed that these do not need.
    progress : function, optional
        Called with (metric, number done, number in all) before each metric and once at the end.

    Returns
    -------
    Dataset or DataTree
        ``step`` first, with nulls and standard errors beside the metrics; a tree with one child per chain
        where there are several. The attributes are the run's, and ``not_computed``: reason by metric; and
        where no metric was named ``on_request``: the names of those that were left out for their cost.

    Raises
    ------
    ValueError
        For an unknown metric, or a run that holds neither a trace nor statistics.
    """
    unasked, costly = (
        [name for name, metric in CATALOGUE.items() if metric.default is default] for default in (True, False)
    )
    names = tuple(unasked) if metrics is None else tuple(dict.fromkeys(metrics))
    chosen = {name: find_metric(name) for name in names}
    chains = schema.chains(run)
    report = _counted(progress, len(chosen) * len(chains))
    analyses = {chain: _analyze_chain(run, chain, chosen, report) for chain in chains}
    if metrics is None:
        analyses = {chain: found.assign_attrs(on_request=costly) for chain, found in analyses.items()}
    report("")
    if list(analyses) == [""]:
        return analyses[""]
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(run.attrs)), **analyses})


def find_metric(name: str) -> Metric:
    """A metric by name.

    Parameters
    ----------
    name : str
        A name of `CATALOGUE`.

    Returns
    -------
    Metric

    Raises
    ------
    ValueError
        For an unknown name, with the closest ones.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name, CATALOGUE, n=3, cutoff=0.4) or list(CATALOGUE)
    raise ValueError(f"no metric {name!r}; closest: {', '.join(map(repr, close))}")


def _counted(progress: Progress | None, total: int) -> Callable[[str], None]:
    done = iter(range(total + 1))
    return lambda name: progress(name, next(done), total) if progress else None


def _analyze_chain(
    run: xr.DataTree, chain: str, chosen: Mapping[str, Metric], report: Callable[[str], None]
) -> xr.Dataset:
    trace = schema.chain_dataset(run, "trace", chain)
    if trace is None:
        for name in chosen:
            report(name)
        return _curves_alone(run, chain, chosen)
    source = Quantities(sources(trace, schema.chain_dataset(run, "statistics", chain)))
    found: dict[str, xr.DataArray] = {}
    reasons: dict[str, str] = {}
    for name, metric in chosen.items():
        report(name)
        try:
            found |= metric.evaluate(source)
        except Unavailable as reason:
            reasons[name] = str(reason)
    dataset = assemble(found, _step(run, trace))
    return dataset.assign_attrs(dict(run.attrs) | {"not_computed": reasons})


def assemble(variables: Mapping[str, xr.DataArray], step: int) -> xr.Dataset:
    """Put measured variables to one dataset, ``step`` first; nulls and counts have no step.

    Parameters
    ----------
    variables : mapping of str to DataArray
        Metrics with their nulls and standard errors, without ``step``.
    step : int
        The training step of the trace.

    Returns
    -------
    Dataset
    """
    stepped = {
        name: value if name.endswith("_null") or name in STEPLESS else value.expand_dims(step=[step])
        for name, value in variables.items()
    }
    streams = list(
        dict.fromkeys(s for v in stepped.values() if "stream" in v.dims for s in v["stream"].values.tolist())
    )
    aligned = {name: v.reindex(stream=streams) if "stream" in v.dims else v for name, v in stepped.items()}
    dataset = xr.Dataset({name: v.transpose(*_ordered(v.dims)) for name, v in aligned.items()})
    return dataset.assign_coords(step=[step])


# Facts about the sample, not about the network at a step.
STEPLESS = ("num_tokens",)
# The order of dims in an analysis; a variable has those that it needs.
DIMS = (
    *("step", "estimator", "direction", "norm", "kind", "scope", "tokens", "centering", "depth"),
    *("other_depth", "connection", "other_connection", "weight"),
    *("component", "stream", "quantile", "reduction"),
)


def _ordered(dims: Iterable[Any]) -> list[str]:
    return sorted(map(str, dims), key=DIMS.index)


def _step(run: xr.DataTree, trace: xr.Dataset) -> int:
    """The training step of a trace, 0 where unknown."""
    known = trace.coords.get("step", trace.attrs.get("step", run.attrs.get("step")))
    return 0 if known is None else int(np.asarray(known))


def _curves_alone(run: xr.DataTree, chain: str, chosen: Mapping[str, Metric]) -> xr.Dataset:
    """What the exact statistics of a run without a trace say about the chosen metrics."""
    curves = training_curves(run, chain=chain)
    kept = curves[[name for name in curves.data_vars if name in chosen or name not in CATALOGUE]]
    reason = "the run holds no trace: capture one with probes.capture(...)"
    missing = {name: reason for name in chosen if name not in kept}
    return kept.assign_attrs(dict(run.attrs) | {"not_computed": missing})
