"""How do the parts of a run become one run? Sums are added, sequences concatenated, stages of a pipeline follow each other.

Every process of a training, and every capture of a part of a corpus, writes a part of its own into one folder. Parts over
different data (data parallelism, sharded weights, a corpus) add their sums; processes that saw the same data (tensor
parallelism), as a digest of their batches tells, count once. With n_r of N terms of the loss in a part, its loss counts
n_r/N and its squared gradients (n_r/N)². What follows from sums is computed again from the joined ones; what is of the
sampled tokens of each part is the mean over parts, with its standard error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.schema.groups import chain_dataset, chains, group_path
from depthscope.diagnostics.schema.live_rows import FINDINGS
from depthscope.diagnostics.schema.loss_course import LossCourse
from depthscope.diagnostics.schema.validation import SchemaError
from depthscope.diagnostics.schema.variables import (
    CUT_GRADIENT,
    OF_SUMS,
    STATISTICS,
    WITHOUT_GRADIENT,
)

PART, STAGE = "part", "pipeline_stage"
"""Attributes of a run that is a part: of the processes of a training (``number`` of ``of``), of a pipeline."""

PARTS = "parts"
"""Attribute of a joined run: how many parts it has, which are missing or behind, and how they were joined."""

SAME = [
    "family",
    "n_streams",
    "layout",
    "dtype",
    "block",
    "num_blocks",
    "num_parameters",
    "seed",
    "loss_reduction",
]
OF_ONE_PART = f"{PART} {STAGE} consequences repair distinct_tokens data_digest".split()
ESTIMATED_PAIRS = "pairs within each part; those between parts are taken to have the same mean"
CLOSE = 1e-6  # of two states, relative to the largest: the same numbers, but for a cast on the way
_NAME = re.compile(r"part-\d{5}(\.zarr(\.zip)?)?")


def part_name(number: int) -> str:
    """The name of a part in the folder of all parts."""
    return f"part-{number:05d}"


def parts_of(folder: Path) -> list[Path]:
    """The parts in a folder, in the order of their numbers; empty where it has none."""
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name for entry in entries if _NAME.fullmatch(entry.name) and not entry.is_symlink()
            ]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def join_parts(runs: Mapping[str, xr.DataTree]) -> xr.DataTree:
    """The run of which some runs are parts.

    ``runs``: by the names of the parts.
    Raises SchemaError: Where they are not parts of one run.
    """
    by_stage: dict[tuple[int, int], dict[str, xr.DataTree]] = {}
    for name, run in runs.items():
        number, of = np.asarray(run.attrs.get(STAGE, (0, 1))).tolist()
        by_stage.setdefault((number, of), {})[name] = run
    numbers = sorted(number for number, _ in by_stage)
    if len({of for _, of in by_stage}) > 1 or numbers != list(range(next(iter(by_stage))[1])):
        raise SchemaError(
            f"the parts are of the stages {sorted(by_stage)} (number, of how many); expected each stage once"
        )
    stages = [_joined_data(by_stage[key]) for key in sorted(by_stage)]
    return stages[0] if len(stages) == 1 else _joined_stages(stages)


# --- parts over other data ---


def _joined_data(runs: Mapping[str, xr.DataTree]) -> xr.DataTree:
    names, first = list(runs), next(iter(runs.values()))
    for name in SAME:
        _require_same(name, {part: run.attrs.get(name) for part, run in runs.items()})
    digests = {part: run.attrs.get("weights_digest") for part, run in runs.items()}
    if len({run.attrs.get("step") for run in runs.values()}) == 1:
        _require_same("weights_digest", {part: of for part, of in digests.items() if of is not None})
    _require_same("the chains", {part: chains(run) for part, run in runs.items()})
    is_corpus = PART not in first.attrs  # captures, each of a part of the data
    statistics = {
        chain: [_of(run, "statistics", chain, part) for part, run in runs.items()] for chain in chains(first)
    }
    attributes = {str(name): value for name, value in first.attrs.items()}
    weights = _PartWeights(next(iter(statistics.values())), attributes, is_corpus=is_corpus)
    nodes: dict[str, xr.Dataset] = {}
    for chain, parts in statistics.items():
        nodes[group_path("statistics", chain)] = _added(parts, weights)
        for group, join in (("trace", _concatenated), ("metrics", _mean_of_parts)):
            known = [chain_dataset(run, group, chain) for run in runs.values()]
            kept = [
                of for of, counts in zip(known, weights.counted, strict=True) if of is not None and counts
            ]
            if kept:
                nodes[group_path(group, chain)] = join(kept)
    nodes["coverage"] = _of(first, "coverage", "", names[0])
    facts = {"number": len(runs), "how": weights.how, **_missing_parts(runs), **weights.facts(names)}
    facts["sentence"] = _sentence(facts)
    attrs = {**_joined_attributes(runs), PARTS: facts}
    if is_corpus and len(runs) > 1:
        attrs["sampling"] = _joined_sampling(runs)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **nodes})


def _joined_attributes(runs: Mapping[str, xr.DataTree]) -> dict[str, Any]:
    """Those of the first part; of proofs the worst, of remarks each once: a part may have too few tokens to show one.

    Each process judged its own rows: the findings of all, with the name of the part.
    """
    of_all = [run.attrs for run in runs.values()]
    found = [{**each, PART: name} for name, run in runs.items() for each in run.attrs.get(FINDINGS, ())]
    attrs = {str(name): value for name, value in of_all[0].items() if name not in OF_ONE_PART}
    errors = [of["reconstruction_error"] for of in of_all if "reconstruction_error" in of]
    unproven = [of["proof"] for of in of_all if of.get("proof") not in (None, "proven")]
    remarks = {
        str((each["kind"], each.get("connections"))): each for of in of_all for each in of.get("remarks", ())
    }
    return {
        **attrs,
        **({"reconstruction_error": max(errors)} if errors else {}),
        **({"proof": unproven[0]} if unproven else {}),
        **({"remarks": list(remarks.values())} if remarks else {}),
        **({FINDINGS: sorted(found, key=lambda of: of["step"])} if found else {}),
    }


def _joined_sampling(runs: Mapping[str, xr.DataTree]) -> dict[str, Any]:
    """Which sequences the parts of a corpus have together; each in one part."""
    spans = {}
    for name, run in runs.items():
        sampling = run.attrs.get("sampling", {})
        first = int(sampling.get("first_sequence", 0))
        spans[name] = (first, first + int(sampling.get("sequences_seen", 0)))
    ordered = sorted(spans.items(), key=lambda of: of[1])
    for (name, (_, end)), (other, (start, _)) in pairwise(ordered):
        if start < end:
            raise SchemaError(
                f"{name} and {other} both have the sequence {start}; expected each in one part: capture(first_sequence=) "
                "numbers those of a part within the whole"
            )
    return {
        **next(iter(runs.values())).attrs["sampling"],
        "first_sequence": ordered[0][1][0],
        "sequences_seen": sum(end - start for start, end in spans.values()),
    }


def _require_same(what: str, by_part: Mapping[str, Any]) -> None:
    values = list(by_part.items())
    other = next(((name, value) for name, value in values if str(value) != str(values[0][1])), None)
    if other is not None:
        raise SchemaError(
            f"{what} is {values[0][1]} in {values[0][0]} and {other[1]} in {other[0]}; expected parts of one run"
        )


def _of(run: xr.DataTree, group: str, chain: str, part: str) -> xr.Dataset:
    found = chain_dataset(run, group, chain)
    if found is None:
        raise SchemaError(
            f"{part} has no {group} of {chain or 'its chain'}; expected the same groups in all parts"
        )
    return found


def _missing_parts(runs: Mapping[str, xr.DataTree]) -> dict[str, Any]:
    """Which parts of those that there should be are not there."""
    known = [run.attrs[PART] for run in runs.values() if PART in run.attrs]
    numbers = [int(of["number"]) for of in known]
    if len(set(numbers)) < len(numbers):
        raise SchemaError(f"the parts have the numbers {sorted(numbers)}; expected each part once")
    # Such as of an earlier attempt in the same folder.
    _require_same(
        "the number of processes", {name: run.attrs.get(PART, {}).get("of") for name, run in runs.items()}
    )
    if not known or STAGE in next(iter(runs.values())).attrs:
        return {}
    missing = sorted(set(range(int(known[0]["of"]))) - set(numbers))
    return {"missing": missing} if missing else {}


def _sentence(facts: Mapping[str, Any]) -> str:
    """What is missing of a joined run, for people."""
    said = [f"{facts['number']} parts; {facts['how']}"]
    if "missing" in facts:
        said.append(f"no part of the processes {', '.join(map(str, facts['missing']))} is there")
    said += [f"{name} ended with step {step}" for name, step in facts.get("last_step", {}).items()]
    if "same_data" in facts:
        said.append(f"{', '.join(facts['same_data'])} saw the data of others, and count once")
    return "; ".join(said)


class _PartWeights:
    """How much each part counts at each step: ``present``, ``counted`` (one of those with the same data) and ``share``."""

    def __init__(self, parts: Sequence[xr.Dataset], attrs: Mapping[str, Any], *, is_corpus: bool):
        steps = sorted(set().union(*(part["step"].values.tolist() for part in parts)))
        lasts = [int(part["step"].values[-1]) for part in parts]
        if len(parts) > 1 and len(steps) > 1 and min(lasts) == steps[-2]:
            steps = steps[:-1]  # the last step is written in some processes and not yet in others
        self.steps, self._lasts = np.array(steps), lasts
        digests = [self.at_steps(part["batch_digest"]) if "batch_digest" in part else None for part in parts]
        self.counted = [self._is_new(number, digests) for number in range(len(parts))]
        tokens = np.stack([self.at_steps(part["token_count"]) for part in parts])
        self.present = ~np.isnan(tokens)
        given = [
            self.at_steps(part["loss_terms"]) if "loss_terms" in part else tokens[i]
            for i, part in enumerate(parts)
        ]
        terms = np.where(np.isnan(given), tokens, given)
        terms = np.where(self.present & np.array(self.counted)[:, None], terms, 0.0)
        reduction = attrs.get(PART, {}).get("loss") or attrs.get("loss_reduction", "mean")
        assumed = "" if "loss_reduction" in attrs else "; assumed, since loss_reduction was not given"
        with np.errstate(invalid="ignore", divide="ignore"):
            self.share = terms / terms.sum(0)
        self.of_loss = self.share
        if is_corpus:
            sequences = np.stack([self.at_steps(part["sequence_count"]) for part in parts])
            self.of_loss, self.share = sequences / sequences.sum(0), np.ones_like(terms)
            self.how = "parts of a corpus: sums are added"
        elif reduction == "sum":
            self.of_loss = self.share = np.ones_like(terms)
            self.how = "the loss of a part is the sum over its tokens: its gradients count as they are"
        elif reduction == "global_mean":
            copies = len(parts) / max(sum(self.counted), 1)
            of = int(attrs.get(PART, {}).get("of", len(parts)))
            self.of_loss = self.share = np.full_like(terms, copies / of)
            self.how = (
                "the loss of a part is R times its part of the mean over all tokens: its gradients count 1/R"
            )
        else:
            self.how = f"the loss of a part is the mean over its own n_r of N tokens: its gradients count n_r/N{assumed}"

    def at_steps(self, values: xr.DataArray) -> np.ndarray:
        """Numbers at every step, which is the first axis; NaN where the part has no row."""
        return values.astype(float).reindex(step=self.steps).transpose("step", ...).values

    def _is_new(self, number: int, digests: Sequence[np.ndarray | None]) -> bool:
        """Whether a part saw other data than all before it."""
        own = digests[number]
        for other in digests[:number]:
            if own is not None and other is not None:
                known = ~np.isnan(own) & ~np.isnan(other)
                if known.any() and (other == own)[known].all():
                    return False
        return True

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Which parts saw the data of others, and which ended before the last step."""
        same = [name for name, counts in zip(names, self.counted, strict=True) if not counts]
        ended = {
            name: last for name, last in zip(names, self._lasts, strict=True) if last < int(self.steps[-1])
        }
        return ({"same_data": same} if same else {}) | ({"last_step": ended} if ended else {})


def _added(parts: Sequence[xr.Dataset], weights: _PartWeights) -> xr.Dataset:
    """The statistics of all parts, each as the table of variables says."""
    first = parts[0]
    found: dict[str, Any] = {}
    for name in [str(name) for name in first.data_vars if all(name in part for part in parts)]:
        like = first[name]
        sizes = {str(i): {**part[name].sizes, "step": 0} for i, part in enumerate(parts)}
        _require_same(f"the size of {name}", sizes)
        if "step" in like.dims:
            values = np.stack([weights.at_steps(part[name]) for part in parts])
            dims = ("step", *(dim for dim in like.dims if dim != "step"))
        else:
            values, dims = np.stack([part[name].values for part in parts]), like.dims
        added = _joined_values(STATISTICS[name].parts, values, weights, by_step="step" in dims)
        if added is not None:
            found[name] = (dims, added, like.attrs)
    counted = [part for part, counts in zip(parts, weights.counted, strict=True) if counts]
    found["unit_pair_sum"] = _pair_sum(counted, weights)
    if "loss" in found:
        course = LossCourse()
        found["loss_rise"] = ("step", np.array([course.add(float(loss)) for loss in found["loss"][1]]))
    coords = {name: of.variable for name, of in first.coords.items() if name != "step"}
    return xr.Dataset(found, {**coords, "step": weights.steps}, attrs=first.attrs)


def _joined_values(
    how: str, values: np.ndarray, weights: _PartWeights, *, by_step: bool
) -> np.ndarray | None:
    """One statistic of all parts, (part, step, …) or (part, …); None where it is not known how it adds up."""
    if how == "share":  # every process has one of them
        return np.asarray(values.sum(0))
    counts = weights.present & np.array(weights.counted)[:, None]  # (part, step)
    factors = {"sum": np.ones_like(weights.share), "loss": weights.of_loss, "squares": weights.share**2}
    lead = (*counts.shape, *(1,) * (values.ndim - 2)) if by_step else (len(values), *(1,) * (values.ndim - 1))
    if not by_step:
        counts, factors = np.array(weights.counted), {"sum": np.ones(len(values))}
    if how == "largest":
        return np.asarray(np.where(counts.reshape(lead), values, -np.inf).max(0))
    if how in factors:
        weighted = values.astype(float) * factors[how].reshape(lead)
        return np.asarray(np.where(counts.reshape(lead), weighted, 0.0).sum(0))
    return np.asarray(values[0]) if how == "first" or not by_step else None


def _pair_sum(parts: Sequence[xr.Dataset], weights: _PartWeights) -> Any:
    """‖Σ u‖² − count over the tokens of all parts: exactly where their unit sums are known, else by the pairs within parts."""
    # (part, step, depth, stream)
    within = np.stack([weights.at_steps(part["unit_pair_sum"]) for part in parts])
    count = np.stack([weights.at_steps(part["token_count"]) for part in parts])[..., None, None]
    total, known = np.nansum(count, axis=0), np.where(np.isnan(within), 0.0, count * (count - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.nansum(within, axis=0) * total * (total - 1) / known.sum(0)
    found = np.where((np.isnan(within) & ~np.isnan(count)).any(0), np.nan, found)
    if len(parts) == 1:
        return ("step", "depth", "stream"), found
    units = [
        part["unit_sum"].transpose("depth", "stream", "feature").values.astype(float)
        for part in parts
        if "unit_sum" in part
    ]
    # The pooled sums are those of the last step, where each part's own pairs say so.
    own = [np.square(unit).sum(-1) for unit in units]
    if len(own) == len(parts) and all(
        np.allclose(square - n[-1], pairs[-1], rtol=1e-6, atol=1e-6 * np.nanmax(square, initial=0.0))
        for square, n, pairs in zip(own, count, within, strict=True)
    ):
        between = np.square(np.sum(units, axis=0)).sum(-1) - np.sum(own, axis=0)
        found[-1] = within[:, -1].sum(0) + between
    return ("step", "depth", "stream"), found, {"estimator": ESTIMATED_PAIRS}


def _concatenated(traces: Sequence[xr.Dataset]) -> xr.Dataset:
    """The sampled sequences of all parts; shorter ones are padded, as those of several batches are."""
    tokens = max(trace.sizes["token"] for trace in traces)
    padded = [_padded(trace, tokens) for trace in traces]
    names = [name for name in padded[0].data_vars if all(name in trace for trace in padded)]
    joined = xr.concat(
        [trace[names] for trace in padded],
        "sample", data_vars="minimal", coords="minimal", compat="override", join="override", combine_attrs="override",
    )  # fmt: skip
    numbers = joined["sample"].values
    unique = numbers if len(set(numbers.tolist())) == len(numbers) else np.arange(len(numbers))
    return joined.assign_coords(sample=unique)


def _padded(trace: xr.Dataset, tokens: int) -> xr.Dataset:
    missing = tokens - trace.sizes["token"]
    if not missing:
        return trace
    empty: dict[str, Any] = {"b": False, "O": "", "U": "", "T": "", "i": -1, "f": 0.0}
    fill: dict[Any, Any] = {
        name: empty[of.dtype.kind] for name, of in trace.data_vars.items() if "token" in of.dims
    }
    return trace.pad(token=(0, missing), constant_values=fill).assign_coords(token=np.arange(tokens))


def _mean_of_parts(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """What parts measured on their own tokens, but for what follows from sums: the mean over parts with its standard error."""
    first, steps = parts[0], sorted(set.intersection(*(set(part["step"].values.tolist()) for part in parts)))
    found: dict[str, Any] = {}
    for name, like in first.data_vars.items():
        if like.attrs.get(OF_SUMS) or not all(name in part for part in parts):
            continue
        if "step" not in like.dims or len(parts) == 1:
            found[str(name)] = like.sel(step=steps) if "step" in like.dims else like
            continue
        values = np.stack([part[name].sel(step=steps).values for part in parts])
        attrs = {
            **like.attrs,
            "estimator": f"mean over {len(parts)} parts, of each {like.attrs.get('estimator', 'its own')}",
        }
        found[str(name)] = (like.dims, values.mean(0), attrs)
        if not str(name).endswith("_stderr"):
            error = values.std(0, ddof=1) / len(parts) ** 0.5
            about = {"long_name": f"standard error over parts of {like.attrs.get('long_name', name)}"}
            found[f"{name}_stderr"] = (like.dims, error, about)
    coords = {
        name: of.variable for name, of in first.coords.items() if name != "step" and "step" not in of.dims
    }
    return xr.Dataset(found, {**coords, "step": np.array(steps)}, attrs=first.attrs)


# --- the stages of a pipeline ---


def _joined_stages(stages: Sequence[xr.DataTree]) -> xr.DataTree:
    """Depth after depth, the state that two stages share counted once; metrics over all depths are those of `analyze`."""
    for number, run in enumerate(stages):
        if chains(run) != [""]:
            raise SchemaError(
                f"stage {number} has the chains {chains(run)}; expected one chain in each stage"
            )
    names = {f"stage {number}": run for number, run in enumerate(stages)}
    for name in ("family", "n_streams", "layout", "dtype", "autocast", "seed"):
        _require_same(name, {stage: run.attrs.get(name) for stage, run in names.items()})
    traces = [run["trace"].to_dataset() for run in stages]
    for number, (before, after) in enumerate(pairwise(traces)):
        last, first = before["residual"].isel(depth=-1).values, after["residual"].isel(depth=0).values
        same = last.shape == first.shape and np.array_equal(before["mask"], after["mask"])
        with np.errstate(invalid="ignore"):
            size = np.nanmax(np.abs(last), initial=0.0)
        if not (same and np.allclose(last, first, rtol=0.0, atol=CLOSE * size, equal_nan=True)):
            raise SchemaError(
                f"the last state of stage {number} ({last.shape}) is not the first one of stage {number + 1} ({first.shape}); "
                "expected runs over the same data, whose stages follow each other without a layer between"
            )
    nodes = {"trace": _along_depth(traces), "coverage": stages[0]["coverage"].to_dataset()}
    parts = [run["statistics"].to_dataset() for run in stages]
    for name in ("step", "token_count", "sequence_count"):
        _require_same(
            name, {stage: part[name].values.tolist() for stage, part in zip(names, parts, strict=True)}
        )
    nodes["statistics"] = _along_depth(parts)
    attrs = {
        name: value
        for name, value in stages[0].attrs.items()
        if name not in ("memory", "remarks", "weights_digest")
    }
    attrs |= {name: stages[-1].attrs[name] for name in ("loss_reduction",) if name in stages[-1].attrs}
    attrs |= {name: sum(int(run.attrs[name]) for run in stages) for name in ("num_blocks", "num_parameters")}
    attrs[PARTS] = {"number": len(stages), "sentence": f"{len(stages)} stages of a pipeline"}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **nodes})


def _along_depth(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """The depths, connections and weights of all stages, numbered on."""
    whole, depths, connections, layers = [], 0, 0, 0
    for number, part in enumerate(parts):
        own = _numbered_on(part, depths - int(part["depth"][0]), connections, layers, number)
        layers, connections = int(own["layer"].max()) + 1, connections + own.sizes.get("connection", 0)
        # The last state of the stage before is the first one of this stage.
        whole.append(own if number == 0 else own.isel(depth=slice(1, None)))
        depths = int(own["depth"][-1])
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in reversed(whole) for name in part.data_vars):
        having = [part[name] for part in whole if name in part]
        axis = next((dim for dim in ("depth", "connection", "weight") if dim in having[0].dims), None)
        if axis is None:
            found[str(name)] = having[-1]  # such as the loss, which only the last stage has
            continue
        joined = xr.concat(having, axis, combine_attrs="override", coords="minimal", compat="override")
        found[str(name)] = joined.transpose(*having[0].dims)
        for listed in (WITHOUT_GRADIENT, CUT_GRADIENT):
            of_all = [int(depth) for part in having for depth in np.atleast_1d(part.attrs.get(listed, []))]
            if of_all:
                found[str(name)].attrs[listed] = of_all
    return xr.Dataset(found, attrs=whole[0].attrs)


def _numbered_on(part: xr.Dataset, depths: int, connections: int, known: int, number: int) -> xr.Dataset:
    """A stage with the numbers of its depths, connections and blocks in the complete model."""
    of_blocks = part["layer"].values[part["layer"].values >= 0]
    first = int(of_blocks.min()) if len(of_blocks) else known
    if first not in (0, known):
        raise SchemaError(f"the blocks of stage {number} begin with number {first}; expected {known}, or 0")
    changed = part.copy().assign_coords(depth=part["depth"] + depths)  # whose attributes are written below
    for name, by in (
        *((layer, known - first) for layer in ("layer", "connection_layer", "weight_layer")),
        *(("connection", connections), ("depth_in", depths), ("depth_out", depths)),
    ):
        if name in changed.coords:
            of = changed[name]
            changed = changed.assign_coords({name: of.where(of < 0, of + by)})
    for variable in changed.data_vars.values():
        for listed in (WITHOUT_GRADIENT, CUT_GRADIENT):
            if listed in variable.attrs:
                shifted = [int(depth) + depths for depth in np.atleast_1d(variable.attrs[listed])]
                variable.attrs[listed] = [depth for depth in shifted if number == 0 or depth != depths]
    return changed
