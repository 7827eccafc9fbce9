"""What is known about a run? Its attributes, its analysis and its findings: one reading for each chain."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.text.visible import visible, visible_name
from depthscope.diagnostics import CATALOGUE, Finding, analyze, judge, schema
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import results_beside
from depthscope.diagnostics.metrics.declaration import AXES
from depthscope.diagnostics.quantities.registry import DIMS, FACTS, with_facts
from depthscope.diagnostics.verdicts.magnitude import with_joined_stages

LIVE = "live"
"""Attribute of /metrics that were computed at the steps of a training, as `probes.record(metrics=…)` does."""


@dataclass(frozen=True)
class Reading:
    """One chain of one run, analysed and judged.

    ``name``: the run's name; ``run/chain`` where the run has several chains.
    ``attrs``: the run's attributes: model, family, seed, …
    ``analysis``: what `diagnostics.analyze` returns, or the stored /metrics of the run.
    ``findings``: worst first.
    ``path``: the file or folder that the run was opened from; empty for a run in memory.
    ``passed``: verdicts that were judged and found nothing.
    ``chain``: the chain's name in the run, empty where it has one.
    ``results``: what ``depthscope ablate`` and ``ds.lens`` gave for the run, where their results are
    next to it.
    ``num_steps``: steps of a training that the run has statistics of; of a live store those that it had when it was
    analysed.
    """

    name: str
    attrs: Mapping[str, Any]
    analysis: xr.Dataset
    findings: tuple[Finding, ...]
    path: str = ""
    passed: tuple[Finding, ...] = ()
    chain: str = ""
    results: Mapping[str, xr.Dataset] = field(default_factory=dict)
    num_steps: int = 1

    @property
    def run(self) -> str:
        """The run's name alone, which all of its chains share."""
        return self.name.removesuffix(f"/{self.chain}") if self.chain else self.name

    @property
    def not_computed(self) -> dict[str, list[str]]:
        """Metrics that the run could not feed, by the reason."""
        # By the reason: many metrics lack for the same one, which is printed once.
        reasons: dict[str, list[str]] = {}
        for metric, reason in self.analysis.attrs.get("not_computed", {}).items():
            reasons.setdefault(str(reason), []).append(str(metric))
        return reasons


def read_runs(
    runs: Mapping[str, xr.DataTree],
    *,
    paths: Mapping[str, Path] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    last_step: bool = False,
) -> list[Reading]:
    """Analyse and judge runs; complete stored metrics are used as they are.

    ``paths``: where runs were opened from: the result of a lens that was saved there is evidence for its verdicts.
    ``progress``: called with (metric, number done, number in all) for each run.
    ``last_step``: of a live store read the metrics of the last step alone: those of all steps may be gigabytes.
    Raises InputError: For no run at all, or a run without a trace and without metrics.
    """
    if not runs:
        raise InputError("no run was given; name at least one, such as runs/a.zarr")
    results = {
        name: results_beside(path, *(runs[name].attrs.get(of) for of in ("weights_digest", "data_digest")))
        for name, path in (paths or {}).items()
    }
    analyses = {name: _analyses(run, progress, last_step) for name, run in runs.items()}
    return [
        judged(
            visible_name(f"{name}/{chain}" if chain else name),
            # Of several chains one may be proven and another not.
            shown_attributes(
                {**run.attrs, **{name: analysis.attrs[name] for name in FACTS if name in analysis.attrs}}
            ),
            analysis,
            chain=chain,
            path=str((paths or {}).get(name, "")),
            results=results.get(name, {}),
            # A run of metrics alone has no statistics, and counts as one step.
            num_steps=(schema.chain_dataset(run, "statistics", chain) or xr.Dataset()).sizes.get("step", 1),
        )
        for name, run in runs.items()
        for chain, analysis in analyses[name]
    ]


def judged(
    name: str,
    attrs: Mapping[str, Any],
    analysis: xr.Dataset,
    *,
    chain: str,
    path: str,
    results: Mapping[str, xr.Dataset],
    num_steps: int = 1,
) -> Reading:
    """A reading of an analysis: the verdicts are asked here."""
    found = judge(analysis, passed=True)
    return Reading(
        name,
        attrs,
        analysis,
        tuple(finding for finding in found if finding.severity),
        path,
        passed=tuple(finding for finding in found if not finding.severity),
        chain=chain,
        results=results,
        num_steps=num_steps,
    )


def shown_attributes(value: Any) -> Any:
    """Attributes of a run in whose text everything can be seen, at every level."""
    if isinstance(value, Mapping):
        return {visible_name(key): shown_attributes(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown_attributes(part) for part in value]
    return visible(value, lines=True) if isinstance(value, str) else value


def sentence_of(attrs: Mapping[str, Any], name: str) -> str | None:
    """What a fact such as ``memory`` or `schema.LIVE` says in words; None where the run does not tell."""
    # A file of another tool may have anything there.
    fact = attrs.get(name)
    sentence = fact.get("sentence") if isinstance(fact, Mapping) else None
    return sentence if isinstance(sentence, str) else None


def _analyses(
    run: xr.DataTree, progress: Callable[[str, int, int], None] | None, last_step: bool
) -> list[tuple[str, xr.Dataset]]:
    stored = {chain: schema.chain_dataset(run, "metrics", chain) for chain in schema.chains(run)}
    if last_step and schema.LIVE in run.attrs:
        stored = {
            chain: dataset.isel(step=[-1]) if dataset is not None and "step" in dataset.dims else dataset
            for chain, dataset in stored.items()
        }
    known = {chain: dataset for chain, dataset in stored.items() if dataset is not None}
    for dataset in known.values():
        _require_own_dims(dataset)
    if not _suffices(run, stored, known):
        fresh = schema.by_chain(analyze(run, progress=progress))
        known = {chain: _with_stored(dataset, known.get(chain)) for chain, dataset in fresh.items()}
    return [
        # Stored metrics may lack the run's attributes of its reading, which every finding and figure repeats.
        (chain, with_facts(dataset.load(), run.attrs))
        for chain, dataset in with_joined_stages(known).items()
    ]


def _require_own_dims(stored: xr.Dataset) -> None:
    """Refuse a metric of the catalogue along other dims: verdicts and figures name those that it is declared with."""
    for name in CATALOGUE.keys() & stored.data_vars.keys():
        dims = stored[name].dims
        if CATALOGUE[name].axis not in dims or set(dims) - {"step", *DIMS}:
            raise schema.SchemaError(
                f"its metric {name} has the dims {', '.join(map(repr, dims))}; expected {', '.join(CATALOGUE[name].dims)}"
            )


def _suffices(run: xr.DataTree, stored: Mapping[str, Any], known: Mapping[str, xr.Dataset]) -> bool:
    """Whether the stored metrics of a run make a new analysis superfluous."""
    # One chain without metrics is reason enough: `analyze` computes all chains of a run together.
    if not known or len(known) < len(stored):
        return False
    # A history has metrics of steps whose states are gone; an analysis of the last trace would replace it by one step.
    final = all(
        data.attrs.get(schema.COMPLETE) or (data.sizes.get("step", 1) > 1 and LIVE not in data.attrs)
        for data in known.values()
    )
    has_trace = any(schema.chain_dataset(run, "trace", chain) is not None for chain in stored)
    return final or not has_trace


def _with_stored(fresh: xr.Dataset, stored: xr.Dataset | None) -> xr.Dataset:
    """An analysis together with stored metrics that it does not compute, such as a user's own."""
    if stored is not None and LIVE in stored.attrs:
        return with_live(fresh, stored)
    # Metrics of another step are of other states: they cannot be in one dataset with the new ones.
    if stored is None or not fresh["step"].equals(stored["step"]):
        return fresh
    added = {name: stored[name] for name in stored.data_vars if name not in fresh}
    return fresh.assign(added)


def with_live(fresh: xr.Dataset, live: xr.Dataset) -> xr.Dataset:
    """What was measured while a training ran, with an analysis of its stored sequences at the last step.

    ``live``: the /metrics that were recorded, by step.
    Returns: By step; where both have a number, the recorded one.
    """
    # The stored sequences are those of the last measured step; of a store that is still written, of one not long before.
    fresh = fresh.assign_coords(step=live["step"].values[-1:])
    filled = {name: _only_unmeasured(fresh[name], live[name]) for name in fresh.data_vars if name in live}
    joined = live.combine_first(fresh.assign(filled))
    for name in joined.data_vars:
        attrs = {**(fresh[name].attrs if name in fresh else {}), **(live[name].attrs if name in live else {})}
        if name in fresh and name in live and "estimator" in attrs:
            analysed = fresh[name].attrs.get("estimator", "")
            attrs["estimator"] = f"{attrs['estimator']}; what that lacks, of the stored sequences: {analysed}"
        joined[name].attrs = attrs
    return joined.assign_attrs({**fresh.attrs, LIVE: live.attrs[LIVE]})


def _only_unmeasured(fresh: xr.DataArray, live: xr.DataArray) -> xr.DataArray:
    """What an analysis has under labels that were measured in no step: elsewhere NaN is what was measured."""
    if "step" not in live.dims:  # a null
        return fresh
    places = [dim for dim in live.dims if dim == "step" or str(dim).removeprefix("other_") in AXES]
    measured = live.notnull().any(places)
    labels = {dim: fresh[dim] for dim in measured.dims if dim in fresh.coords}
    return fresh.where(~measured.reindex(labels, fill_value=False))


def read_paths(
    paths: Sequence[str],
    *,
    max_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Reading], dict[str, str]]:
    """Open, analyse and judge runs; one that cannot be read, analysed or judged is left out, and the others stay.

    ``paths``: run files, or folders with some in them.
    ``progress``: called with (metric, number done, number in all) for each run.
    Returns: The readings, and the reasons why runs were left out by their names.
    Raises Exception: That of the run, where there is one run and it is left out.
    Raises FileNotFoundError: Where a path does not exist.
    Raises InputError: Where a folder contains no run, or every run is left out.
    """
    readings: list[Reading] = []
    left_out: dict[str, str] = {}
    found = find_runs(paths)
    for name, path in found.items():
        try:
            run = schema.open_run(path, max_bytes=max_bytes)
            try:
                read = read_runs({name: run}, paths={name: path}, progress=progress)
                readings += [replace(reading, path=str(path)) for reading in read]
            finally:
                run.close()
        # Whatever is wrong with one run, also where it meets a mistake of ours: it must not hide the verdict on others.
        except Exception as error:
            if len(found) == 1:
                raise
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            left_out[name] = f"{kind}{error}"
    if not readings:
        first = next(iter(left_out.values()))
        raise InputError(f"none of the {len(left_out)} runs can be read; the first of them: {first}")
    return readings, left_out


def find_runs(paths: Sequence[str]) -> dict[str, Path]:
    """The runs of a command line, and those in its folders, by the ends of their paths that make them differ."""
    runs = [run for path in map(Path, paths) for run in _runs_at(path)]
    # The same run by two paths is one. By realpath, since Path.resolve raises a RuntimeError for a link to itself.
    unique = list(dict.fromkeys(Path(os.path.realpath(run)) for run in runs))
    names, parts = list[str](), 0
    while len(set(names)) < len(unique):  # whole paths differ
        parts += 1
        names = schema.short_names(["/".join(path.parts[-parts:]) for path in unique])
    return dict(zip(names, unique, strict=True))


def _runs_at(path: Path) -> list[Path]:
    # A Zarr run is a folder too. A missing path is left to `open_run`, whose error names it.
    if not path.exists() or path.name.endswith(schema.SUFFIXES) or schema.is_live_store(path):
        return [path]
    below = list(schema.list_runs(path).values())
    if not below:
        raise InputError(
            f"no run in {path}: expected files or folders ending in {', '.join(schema.SUFFIXES)}; "
            "make one with: depthscope probe CHECKPOINT --text FILE --out RUN.zarr"
        )
    return below
