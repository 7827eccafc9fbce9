"""What can be measured in a run? Every metric that its trace can feed, and why one is missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.analysis.jackknife import jackknife as jackknife_errors
from depthscope.diagnostics.analysis.jackknife import num_replicas
from depthscope.diagnostics.analysis.training_curves import losses, training_curves
from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities.registry import (
    CHOICES,
    DIMS,
    FACTS,
    Quantities,
    Unavailable,
    sources,
    with_facts,
)
from depthscope.diagnostics.schema import chain_dataset, chains, open_run

Progress = Callable[[str, int, int], None]


def analyze(
    run: xr.DataTree | str | os.PathLike[str],
    metrics: str | Iterable[str] | None = None,
    *,
    jackknife: bool = False,
    scheduler: Any = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset | xr.DataTree:
    """Measure a run with every metric of the catalogue that it can feed.

    Parameters
    ----------
    run : DataTree or path-like
        A run with a trace; one with statistics only gives its training curves. With ``scheduler`` also the path of a saved
        run, whose arrays the workers read themselves.
    metrics : str or iterable of str, optional
        One name of `CATALOGUE` or several; by default all. Nothing is computed that these do not need.
    jackknife : bool
        Estimate the standard errors of metrics over pooled tokens too, by leaving out one sequence at a time: it
        costs about one more analysis for each sequence. See `diagnostics.analysis.jackknife`. Means over sequences have
        standard errors in any case.
    scheduler : str or distributed.Client, optional
        Measure a run that is larger than memory part by part: ``"threads"`` of this process, as many as have memory and a
        processor, or the workers of a client of dask, which read the run under the same path. CKA takes the precision that
        the depths it is given need, and differs from that of all together by less than a relative 1e-6; all other numbers
        are the same.
    memory : int, optional
        Bytes that the threads may take together; by default what the machine has free.
    progress : function, optional
        Called with (metric, number done, number in all) before each metric and once at the end; with ``scheduler`` after each
        task.

    Returns
    -------
    Dataset or DataTree
        ``step`` first, with nulls and standard errors as ``NAME_null`` and ``NAME_stderr``; a tree with one child per
        chain where there are several. The attributes are the run's, ``not_computed``: reason by metric, and ``notes``:
        sentences, by metric, where the sample is too small for the question. ``to_zarr`` writes all of them.

    Raises
    ------
    InputError
        For an unknown metric, what is no run, or a run that has neither a trace nor statistics; for ``jackknife`` with
        ``scheduler``.
    """
    if scheduler is not None:
        return _analyze_scheduled(run, metrics, scheduler, memory, jackknife, progress)
    _require_run(run)
    assert isinstance(run, xr.DataTree)
    chosen = {name: find_metric(name) for name in _metric_names(metrics)}
    traces = {chain: chain_dataset(run, "trace", chain) for chain in chains(run)}
    replicas = [num_replicas(trace) for trace in traces.values() if jackknife and trace is not None]
    report = _progress_counter(progress, len(traces) * len(chosen) + sum(replicas))
    analyses = {
        chain: _analyze_chain(run, chain, trace, chosen, report, jackknife) for chain, trace in traces.items()
    }
    report("")
    return _of_chains(run, analyses, metrics)


def _of_chains(
    run: xr.DataTree, analyses: Mapping[str, xr.Dataset], metrics: str | Iterable[str] | None
) -> xr.Dataset | xr.DataTree:
    """The analyses of all chains as one result."""
    if metrics is None:
        analyses = {chain: _with_losses(run, chain, found) for chain, found in analyses.items()}
    if list(analyses) == [""]:
        return analyses[""]
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(run.attrs)), **analyses})


def _with_losses(run: xr.DataTree, chain: str, analysis: xr.Dataset) -> xr.Dataset:
    """An analysis of a trace with what the run knows of the loss at its step."""
    statistics = chain_dataset(run, "statistics", chain)
    if statistics is None or "loss" in analysis or "step" not in statistics.dims:
        return analysis
    known = xr.Dataset(losses(statistics))
    at = np.isin(known["step"].values, analysis["step"].values) if known else np.zeros(0, dtype=bool)
    return analysis.assign(known.isel(step=at)) if at.sum() == analysis.sizes["step"] else analysis


def _analyze_scheduled(
    run: xr.DataTree | str | os.PathLike[str],
    metrics: str | Iterable[str] | None,
    scheduler: Any,
    memory: int | None,
    jackknife: bool,
    progress: Progress | None,
) -> xr.Dataset | xr.DataTree:
    """Measure a run part by part; of one in memory or opened already only by threads."""
    from depthscope.diagnostics.analysis.scheduled import measure, trace_of

    if jackknife:
        raise InputError(
            "jackknife=True leaves out whole sequences, which no part does; leave scheduler= out, or it"
        )
    is_saved = isinstance(run, (str, os.PathLike))
    if not is_saved and scheduler != "threads":
        raise InputError(
            "got a run in memory, which the workers of a cluster do not see; save it where all of them read it, and give its "
            "path: analyze(path, scheduler=…)"
        )
    path = os.path.abspath(run) if is_saved else ""
    chosen = {name: find_metric(name) for name in _metric_names(metrics)}
    with open_run(path, checksums=False) if is_saved else nullcontext(run) as opened:
        _require_run(opened)
        assert isinstance(opened, xr.DataTree)
        analyses = {}
        for chain in chains(opened):
            if chain_dataset(opened, "trace", chain) is None:
                analyses[chain] = _curves_alone(opened, chain, chosen)
                continue
            trace = trace_of(opened, chain)
            values, reasons = measure(
                trace, (path, chain), list(chosen), scheduler, memory=memory, progress=progress
            )
            of_all = Quantities(trace)
            found = {name: of_all.unlabelled(value) for name, value in values.items()}
            analyses[chain] = _finished(opened, trace, of_all, found, reasons, jackknife=False)
        return _of_chains(opened, analyses, metrics)


def _metric_names(metrics: str | Iterable[str] | None) -> list[str]:
    if metrics is None:
        return list(CATALOGUE)
    if isinstance(metrics, str):  # an iterable too, of its letters
        return [metrics]
    if not isinstance(metrics, Iterable):
        raise InputError(f"got metrics={metrics!r}; expected names, such as ['effective_rank', 'cka']")
    return list(metrics)


def _require_run(run: Any) -> None:
    if isinstance(run, xr.DataTree):
        return
    given = f"a {type(run).__name__}"
    advice = "capture one with ds.capture(...)"
    if isinstance(run, (str, os.PathLike)):
        given = f"the path {os.fspath(run)!r}"
        advice = "open it: ds.analyze(ds.open_run(path))"
    elif isinstance(run, xr.Dataset):
        advice = "make one of a trace: ds.analyze(ds.diagnostics.create_run(trace, attrs={...}))"
    raise InputError(f"got {given}; expected a run, a DataTree; {advice}")


def find_metric(name: str) -> Metric:
    """A metric by name."""
    if not isinstance(name, str):
        raise InputError(f"got {name!r} as a metric; expected its name, such as 'effective_rank'")
    if name in CATALOGUE:
        return CATALOGUE[name]
    raise InputError(f"no metric {name!r}; {did_you_mean(name, CATALOGUE)}")


def _progress_counter(progress: Progress | None, total: int) -> Callable[[str], None]:
    done = iter(range(total + 1))
    return lambda name: progress(name, next(done), total) if progress else None


def _analyze_chain(
    run: xr.DataTree,
    chain: str,
    trace: xr.Dataset | None,
    chosen: Mapping[str, Metric],
    report: Callable[[str], None],
    jackknife: bool,
) -> xr.Dataset:
    if trace is None:
        # Counted in the total: the progress must arrive there.
        for name in chosen:
            report(name)
        return _curves_alone(run, chain, chosen)
    trace = with_facts(trace, run.attrs)
    source = Quantities(sources(trace, chain_dataset(run, "statistics", chain)))
    found: dict[str, xr.Variable] = {}
    reasons: dict[str, str] = {}
    for name, metric in chosen.items():
        report(name)
        try:
            found.update(metric.evaluate(source))
        # Only this: any other error is a mistake of ours and must not look like a fact about the run.
        except Unavailable as reason:
            reasons[name] = str(reason)
    if jackknife:
        # What all sequences together do not give, they do not give without one either.
        # Where a metric has an error of its own for all that it measures, leaving out sequences would add nothing.
        known = [metric for name, metric in chosen.items() if name in found and not _has_error(found, name)]
        _add_errors(found, jackknife_errors(trace, known, report), chosen)
    return _finished(run, trace, source, found, reasons, jackknife=jackknife)


def _finished(
    run: xr.DataTree,
    trace: xr.Dataset,
    source: Quantities,
    found: Mapping[str, xr.Variable],
    reasons: Mapping[str, str],
    *,
    jackknife: bool,
) -> xr.Dataset:
    """One dataset of what was measured of a chain, with what else is to be known about it."""
    step = trace.coords.get("step", trace.attrs.get("step", run.attrs.get("step")))
    dataset = assemble(found, source, 0 if step is None else int(np.asarray(step)))
    mask = source["mask"].transpose("sample", "token")
    notes = sample_notes(
        dataset,
        num_tokens=int(mask.sum()),
        num_sequences=int(mask.any("token").sum()),
        errors=jackknife,
    )
    # Of several chains one may be proven and another not: each analysis has its own chain's.
    facts = {name: trace.attrs[name] for name in FACTS if name in trace.attrs}
    return dataset.assign_attrs({**run.attrs, **facts, "not_computed": dict(reasons), "notes": notes})


def _has_error(found: Mapping[str, xr.Variable], name: str) -> bool:
    own = found.get(f"{name}_stderr")
    return own is not None and "scope" not in own.dims


def _add_errors(
    found: dict[str, xr.Variable], errors: Mapping[str, xr.Variable], chosen: Mapping[str, Metric]
) -> None:
    """Add jackknife errors to the variables; those of means over sequences are not replaced."""
    for name, error in errors.items():
        own = found.get(f"{name}_stderr")
        if own is None:
            found[f"{name}_stderr"] = chosen[name].stamp_error(error)
        elif "scope" in own.dims:
            # Means over sequences have an error already, which stays: only that of pooled tokens, NaN so far, is filled.
            filled, pooled = own.copy(), {"scope": CHOICES["scope"].index("data")}
            filled[pooled] = own[pooled].fillna(error[{"scope": 0}])
            filled.attrs["estimator"] += f"; over the data: {error.attrs['estimator']}"
            found[f"{name}_stderr"] = filled


def assemble(variables: Mapping[str, xr.Variable], source: Quantities, step: int) -> xr.Dataset:
    """Make one dataset of measured variables, ``step`` first; nulls and facts about the sample have no step.

    ``variables``: metrics with their nulls and standard errors, without ``step``.
    ``source``: knows the labels.
    """
    sizes: dict[Any, int] = {}
    for value in variables.values():
        sizes |= {dim: max(size, sizes.get(dim, 0)) for dim, size in value.sizes.items()}
    data: dict[str, xr.Variable] = {}
    for name, value in variables.items():
        if "stream" in value.dims and value.sizes["stream"] < sizes["stream"]:
            # Shares of streams have no "mean", states have, as the first one: one axis with all labels.
            value = value.pad(stream=(1, 0))
        per_step = not name.endswith("_null") and (name not in CATALOGUE or CATALOGUE[name].per_step)
        dims = ("step", *value.dims) if per_step else value.dims
        data[name] = value.set_dims(dims).transpose(*sorted(map(str, dims), key=_ORDER.index))
    return xr.Dataset(data, source.coordinates(sizes)).assign_coords(step=[step])


_ORDER = ("step", *DIMS)


def _curves_alone(run: xr.DataTree, chain: str, chosen: Mapping[str, Metric]) -> xr.Dataset:
    """The chosen metrics as far as the statistics of a run without a trace give them."""
    curves = training_curves(run, chain=chain)
    # The loss is no metric, and always among the curves.
    found = curves[[name for name in curves.data_vars if name in chosen or name not in CATALOGUE]]
    reason = "the run has no trace: capture one with ds.capture(...)"
    missing = {name: reason for name in chosen if name not in found}
    return found.assign_attrs({**run.attrs, "not_computed": missing})


# --- is the sample large enough?

# All heuristics of ours. Tokens at which the unbiased CKA of unrelated noise has a standard deviation of 0.03 (0.08 at 20,
# whatever the number of features; measured):
TOKENS_FOR_CKA = 50
# Sequences at which a standard error is itself known to 35 %, by 1 / √(2 (S − 1)):
SEQUENCES = 5
# An error of a tenth of the range of CKA.
ERROR_OF_CKA = 0.1


def sample_notes(
    analysis: xr.Dataset, *, num_tokens: int, num_sequences: int, errors: bool = False
) -> dict[str, str]:
    """Sentences about metrics for which the sample is too small.

    ``analysis``: metrics under the names of the catalogue.
    ``errors``: whether standard errors were requested; there may be none.
    Returns: One sentence by name of the metric; "standard errors" for all of them together.
    """
    ranks = ("effective_rank", "participation_ratio")
    found = {name: _of_rank(analysis, name, num_tokens, "tokens") for name in ranks}
    found["gradient_rank"] = _of_rank(analysis, "gradient_rank", num_sequences, "sequences")
    found["cka"] = _of_cka(analysis, num_tokens)
    sentences = {name: note for name, note in found.items() if note and name in analysis}
    # Means over sequences have errors in any case; where errors were not asked for, there is no note about them.
    if errors and num_sequences < SEQUENCES:
        sentences["standard errors"] = _of_errors(num_sequences)
    return sentences


def _of_rank(analysis: xr.Dataset, name: str, count: int, what: str) -> str:
    """A note on a rank that more tokens would raise; judged on all tokens, centred, where the analysis has variants."""
    if name not in analysis:
        return ""
    pick = {"scope": "data", "tokens": "all", "centering": "centred", "stream": "mean"}
    value = analysis[name].sel({dim: label for dim, label in pick.items() if dim in analysis[name].dims})
    largest = float(value.max()) if value.notnull().any() else 0.0
    # Heuristic: 1 / PR is about 1 / N + 1 / (true value), so that at N = 2 PR the true value is twice as large.
    if count >= 2 * largest:
        return ""
    at = int(value.isel(step=-1).argmax("depth"))
    return (
        f"{count} {what} for a rank of {largest:.3g} at depth {at}: more of them would raise it; read it as a "
        "fraction of its noise baseline"
    )


def _of_cka(analysis: xr.Dataset, num_tokens: int) -> str:
    if num_tokens < TOKENS_FOR_CKA:
        return f"{num_tokens} tokens: the unbiased value swings widely below {TOKENS_FOR_CKA} (depthscope's default)"
    if "cka_stderr" not in analysis:
        return ""
    error = float(analysis["cka_stderr"].sel(estimator="unbiased", tokens="all").max())
    if not error > ERROR_OF_CKA:
        return ""
    return f"the standard error of the unbiased value reaches {error:.2f}: sample more sequences"


def _of_errors(num_sequences: int) -> str:
    if num_sequences < 2:
        return "one sequence: no standard error is known; sample more sequences"
    # A standard error of S sequences has itself a relative one of 1 / √(2 (S − 1)).
    own, of_four_times = (100 / (2 * (count - 1)) ** 0.5 for count in (num_sequences, 4 * num_sequences))
    return (
        f"error bars come from {num_sequences} sequences and are themselves uncertain by about {own:.0f} %; "
        f"{4 * num_sequences} give {of_four_times:.0f} %"
    )
