"""How do the runs of parts of the data become the run of all? Samples joined, sums added, statements about all of them.

Each part numbers its sequences within the corpus (``first_sequence=``), and its sample holds the lowest ranks of these numbers
(`rank_in_sample`): the lowest ranks of all parts are the sample that one run over everything would have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.connections.coefficients import relative_error
from depthscope.probes.connections.constraint import MEASURED, measured_constraint, measured_family
from depthscope.probes.session.reservoir import rank_in_sample
from depthscope.probes.statistics.stored_sums import MOMENT_VARIABLES, SKETCH_VARIABLES

SHARD = "shard"
"""Attribute of a run that is one of several parts: ``number`` from 1, ``of`` how many, and facts that all parts share."""

SUMMED = frozenset(
    (
        *(
            "token_count",
            "sequence_count",
            "norm_sum",
            "square_norm_sum",
            "adjacent_cosine_sum",
            "unit_pair_sum",
        ),
        *("gradient_square_norm_sum", "gain_sum", "logit_token_count", "logit_range_sum"),
        *(
            "logit_gradient_square_sum",
            "mixing_gradient_square_sum",
        ),
        *schema.SUMS_OF_COEFFICIENTS,
        *("attention_query_count", "attention_entropy_sum", "sink_mass_sum"),
        *schema.OF_ROUTERS,
        *("feature_sum", "unit_sum"),
    )
)
"""Statistics that add up over tokens; the cosines of pairs get those between two parts besides."""

# The loss of a capture has no course: its rise is NaN in every part.
LARGEST = frozenset(("norm_max", "abs_max", "gain_max", "logit_range_max", "loss_not_finite", "loss_rise"))
OF_WEIGHTS_ALONE = frozenset(("connection_parameter", "cell_parameter"))
"""Statistics that do not depend on the data, and are equal in all parts."""

# What a part does not store because it is 1 in all of its tokens.
ONE_WHERE_MISSING = (*schema.PLAIN_FACTORS, "read_known")
# Measured in the first forward alone, as a run of everything has them.
OF_FIRST_FORWARD = ("mixing_logits", "logit_gradient_norm", "mixing_gradient_norm")
WORST = ("reconstruction_error", "other_orientation_error", "read_error")

AddStreamed = Callable[[Sequence[xr.Dataset], str], tuple[xr.Dataset, str]]


def are_shards(runs: Sequence[xr.DataTree]) -> bool:
    """Whether runs are parts of one corpus, by their attributes."""
    return any(SHARD in run.attrs or _sampling(run).get("first_sequence") for run in runs)


def join_shards(runs: Sequence[xr.DataTree], add_streamed: AddStreamed) -> xr.DataTree:
    """Join the runs of all parts into the run of the complete corpus.

    Sampled sequences and their forwards are bit for bit those of one run; sums are equal to the rounding of float64. Streamed
    sums are added by ``add_streamed``, from the statistics of all parts and the chain's name.

    ``runs``: in any order; of one model, with the same seed and number of sampled sequences.
    ``add_streamed``: adds what was streamed, and gives the reason where something of it is left out.
    Raises InputError: Where a part is missing or there twice, or a part is of other data or was measured in another
    way.
    """
    _require_one_whole(runs)
    runs = sorted(runs, key=lambda run: _span(run)[0])
    _require_gapless(runs)
    kept = _kept_sequences(runs)
    nodes: dict[str, xr.Dataset] = {}
    left_out: list[str] = []
    for chain in schema.chains(runs[0]):
        traces = [_group(run, "trace", chain) for run in runs]
        nodes[group_path("trace", chain)] = _joined_trace(traces, kept, chain)
        statistics, reasons = _added_statistics(runs, chain, add_streamed)
        nodes[group_path("statistics", chain)] = statistics
        left_out += reasons
    leading = nodes[group_path("trace", schema.chains(runs[0])[0])]
    nodes["coverage"] = _added_coverage(
        [_group(run, "coverage", "") for run in runs], OF_FIRST_FORWARD[0] in leading
    )
    attrs = _joined_attributes(runs, leading, nodes["coverage"])
    if left_out:
        attrs["merged_without"] = "; ".join(dict.fromkeys(left_out))
    joined = xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **nodes})
    schema.validate(joined)
    return joined


def _sampling(run: xr.DataTree) -> Mapping[str, Any]:
    found = run.attrs.get("sampling", {})
    return found if isinstance(found, Mapping) else {}


def _span(run: xr.DataTree) -> tuple[int, int]:
    """Number of the first sequence of a part, and of the first one after it."""
    sampling = _sampling(run)
    first = int(sampling.get("first_sequence", 0))
    return first, first + int(sampling["sequences_seen"])


def _require_one_whole(runs: Sequence[xr.DataTree]) -> None:
    """Refuse parts of different wholes."""
    for run in runs:
        if "sequences_seen" not in _sampling(run):
            raise InputError(
                "a run does not say which sequences it has seen (attribute sampling); expected runs of ds.capture"
            )
    _require_same_facts([_sampling(run) for run in runs], ["max_sequences", "seed"])
    shards = [run.attrs[SHARD] for run in runs if SHARD in run.attrs]
    if not shards:
        return
    if len(shards) < len(runs):
        raise InputError(
            "some runs are shards (attribute shard) and others are not; expected shards of one text"
        )
    if len({run.attrs.get("data_digest") for run in runs}) > 1:
        raise InputError(
            "the shards are of different texts (data_digest differs); expected shards of one text"
        )
    _require_same_facts(shards, sorted(set().union(*shards) - {"number"}))
    _require_each_once([int(shard["number"]) for shard in shards], int(shards[0]["of"]))


def _require_same_facts(parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        values = list(dict.fromkeys(str(part.get(name)) for part in parts))
        if len(values) > 1:
            raise InputError(
                f"the parts were made with {name} {' and '.join(values)}; expected the same in all: repeat them with equal "
                "options"
            )


def _require_each_once(numbers: Sequence[int], of: int) -> None:
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise InputError(f"{_named(twice, of)} given more than once; expected each shard once")
    missing = sorted(set(range(1, of + 1)) - set(numbers))
    if missing:
        raise InputError(
            f"{_named(missing, of)} missing; expected all {of}: make {'it' if len(missing) == 1 else 'them'} with --shard"
        )


def _named(numbers: Sequence[int], of: int) -> str:
    words = ", ".join(f"{number}/{of}" for number in numbers)
    return f"shard {words} is" if len(numbers) == 1 else f"shards {words} are"


def _require_gapless(runs: Sequence[xr.DataTree]) -> None:
    for (_, end), (start, after) in pairwise(map(_span, runs)):
        if start < end:
            raise InputError(
                f"two parts have the sequences {start} to {min(end, after) - 1}; expected each sequence in one of them"
            )
        if start > end:
            raise InputError(
                f"the sequences {end} to {start - 1} are in no part; expected parts without a gap"
            )


def _group(run: xr.DataTree, group: str, chain: str) -> xr.Dataset:
    found = schema.chain_dataset(run, group, chain)
    if found is None:
        raise InputError(
            f"a part has no {group} of {chain or 'its chain'}; expected the same groups and chains in all parts"
        )
    return found


def _kept_sequences(runs: Sequence[xr.DataTree]) -> np.ndarray:
    """Numbers of the sequences that one run over everything would have sampled, in order."""
    chain = schema.chains(runs[0])[0]
    numbers = np.concatenate([_group(run, "trace", chain)["sample"].values for run in runs])
    sampling = _sampling(runs[0])
    chosen = sorted(numbers.tolist(), key=lambda number: rank_in_sample(sampling["seed"], number))
    return np.sort(chosen[: sampling["max_sequences"]])


def _joined_trace(traces: Sequence[xr.Dataset], kept: np.ndarray, chain: str) -> xr.Dataset:
    """The kept sequences of all traces, and of their connections the worst error of the proof."""
    for name in ("depth", "token", "stream", "feature", "connection"):
        sizes = [trace.sizes.get(name) for trace in traces]
        if len(set(sizes)) > 1:
            raise InputError(
                f"the parts have {', '.join(map(str, sizes))} along {name}{f' of {chain}' if chain else ''}; expected the "
                "same: pad all batches to one length"
            )
    traces = [_with_all_variables(trace, traces) for trace in traces]
    # Of a file only the kept sequences are read.
    cut = [trace.isel(sample=np.flatnonzero(np.isin(trace["sample"].values, kept))) for trace in traces]
    first = cut[0]
    joined: dict[str, Any] = {}
    for name in {str(name) for trace in traces for name in trace.variables}:
        parts = [trace.variables[name] for trace in cut if name in trace.variables]
        if name in OF_FIRST_FORWARD:
            continue
        if "sample" in parts[0].dims:
            values = np.concatenate([part.values for part in parts], axis=parts[0].dims.index("sample"))
            joined[name] = xr.Variable(parts[0].dims, values, parts[0].attrs)
        elif name in WORST:
            joined[name] = (parts[0].dims, np.fmax.reduce([part.values for part in parts]))
        elif name == "proof":
            joined[name] = (parts[0].dims, _worst_proofs([part.values for part in parts]))
        else:
            joined[name] = parts[0]
    joined |= _of_first_forward(first, len(joined["sample"]))
    coords = {str(name) for name in first.coords}
    proofs = [str(trace.attrs["proof"]) for trace in traces if "proof" in trace.attrs]
    attrs = first.attrs | ({"proof": _worst_proof(proofs)} if proofs else {})
    return xr.Dataset(
        {name: value for name, value in joined.items() if name not in coords},
        {name: value for name, value in joined.items() if name in coords},
        attrs=attrs,
    )


def _with_all_variables(trace: xr.Dataset, traces: Sequence[xr.Dataset]) -> xr.Dataset:
    """A part's trace with what others store and it does not, because it is 1 in all of its tokens."""
    added: dict[str, Any] = {}
    for name in {str(name) for other in traces for name in other.data_vars} - {*map(str, trace.data_vars)}:
        like = next(other[name].variable for other in traces if name in other)
        sizes = [trace.sizes.get(dim, other) for dim, other in zip(like.dims, like.shape, strict=True)]
        if name in ONE_WHERE_MISSING:
            added[name] = (like.dims, np.ones(sizes, like.dtype))
        elif like.dtype.kind == "f" and "sample" in like.dims:
            added[name] = (like.dims, np.full(sizes, np.nan, like.dtype))
    return trace.assign(added)


def _of_first_forward(first: xr.Dataset, num_sequences: int) -> dict[str, xr.Variable]:
    """The logits of the very first forward, NaN for sequences of others; empty where the sample has none of its sequences."""
    logits = first.get(OF_FIRST_FORWARD[0])
    if logits is None or logits.isnull().all():
        return {}
    whole = logits.pad(sample=(0, num_sequences - logits.sizes["sample"]), constant_values=np.nan)
    return {OF_FIRST_FORWARD[0]: whole.variable} | {
        name: first[name].variable for name in OF_FIRST_FORWARD[1:] if name in first
    }


def _worst_proof(proofs: Sequence[str]) -> str:
    return next((proof for proof in proofs if proof != schema.PROVEN), schema.PROVEN)


def _worst_proofs(rows: Sequence[np.ndarray]) -> np.ndarray:
    """By connection: proven only where it is proven in every part."""
    return np.array(
        [_worst_proof([str(proof) for proof in of_one]) for of_one in zip(*rows, strict=True)], object
    )


def _added_statistics(
    runs: Sequence[xr.DataTree], chain: str, add_streamed: AddStreamed
) -> tuple[xr.Dataset, list[str]]:
    """The statistics of all parts, and sentences on what is not among them."""
    parts = [_group(run, "statistics", chain) for run in runs]
    if any(part.sizes.get("step", 1) != 1 for part in parts):
        raise InputError("a part has several steps; expected parts of one capture, which have one")
    forwards = [int(_group(run, "coverage", "")["expected"].values.max()) for run in runs]
    streamed = (*schema.OF_STREAMING, *MOMENT_VARIABLES, *SKETCH_VARIABLES)
    found: dict[str, xr.Variable] = {}
    reasons: list[str] = []
    for name in {str(name): None for part in parts for name in part.data_vars if name not in streamed}:
        if not all(name in part for part in parts):
            reasons.append(f"{name}: a part has none")
        elif (added := _added(name, [part.variables[name] for part in parts], forwards)) is None:
            reasons.append(f"{name}: how two parts of it are added is not known")
        else:
            found[name] = added
    if "unit_pair_sum" in found and "unit_sum" in found:
        found["unit_pair_sum"] = _pair_sum(parts)
    coords = {name: of.variable for name, of in parts[0].coords.items() if "other_depth" not in of.dims}
    statistics = xr.Dataset(found, coords, attrs=parts[0].attrs)
    if any("streamed_count" in part for part in parts):
        of_streaming, reason = add_streamed(parts, chain)
        statistics = statistics.assign(
            {str(n): of_streaming[n] for n in of_streaming.data_vars if n in streamed}
        )
        reasons += [reason] if reason else []
    return statistics, reasons


def _added(name: str, parts: Sequence[xr.Variable], forwards: Sequence[int]) -> xr.Variable | None:
    """One statistic of all parts; None where it is not known how they add up."""
    if name in OF_WEIGHTS_ALONE:
        return parts[0]
    values = np.stack([part.values for part in parts])
    if name in SUMMED:
        added = values.sum(0)
    elif name in LARGEST:
        added = np.fmax.reduce(values)
    elif name == "loss":  # the mean over forwards
        added = np.average(values, axis=0, weights=forwards)
    else:
        return None
    return xr.Variable(parts[0].dims, added, parts[0].attrs)


def _pair_sum(parts: Sequence[xr.Dataset]) -> xr.Variable:
    """‖Σ u‖² − count over the tokens of all parts: within each part, and twice the products between two of them."""
    dims = parts[0]["unit_pair_sum"].dims
    units = [
        part["unit_sum"].transpose("depth", "stream", "feature").values.astype(np.float64) for part in parts
    ]
    between = np.square(np.sum(units, axis=0)).sum(-1) - np.sum(
        [np.square(unit).sum(-1) for unit in units], axis=0
    )
    within = np.sum(
        [part["unit_pair_sum"].transpose("step", "depth", "stream").values for part in parts], axis=0
    )
    return xr.Variable(("step", "depth", "stream"), within + between).transpose(*dims)


def _added_coverage(parts: Sequence[xr.Dataset], with_logits: bool) -> xr.Dataset:
    """How often each site was expected and fired in all parts together; logits only in the first forward of all."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = [str(name) for name in parts[0].data_vars]
    for number, part in enumerate(parts):
        columns = {name: part[name].values.tolist() for name in names}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(names, values, strict=True))
            if row["site"] == OF_FIRST_FORWARD[0] and (number or not with_logits):
                continue
            key = tuple(row[name] for name in ("place_name", "site", "module", "layer", "chain"))
            if key in rows:
                for name in ("expected", "fired"):
                    rows[key][name] += row[name]
                rows[key]["why"] = rows[key]["why"] or row["why"]
            else:
                rows[key] = row
    return xr.Dataset(
        {
            name: (
                "place",
                np.array(
                    [row[name] for row in rows.values()],
                    np.int64 if parts[0][name].dtype.kind in "iu" else object,
                ),
            )
            for name in names
        }
    )


def _joined_attributes(
    runs: Sequence[xr.DataTree], trace: xr.Dataset, coverage: xr.Dataset
) -> dict[str, Any]:
    """The first part's attributes, with what is said about all tokens measured on those of the joined trace."""
    attrs = {str(name): value for name, value in runs[0].attrs.items() if name != SHARD}
    errors = [run.attrs["reconstruction_error"] for run in runs if "reconstruction_error" in run.attrs]
    if errors:
        attrs["reconstruction_error"] = max(errors)
    proofs = [str(run.attrs["proof"]) for run in runs if "proof" in run.attrs]
    if proofs:
        attrs["proof"] = _worst_proof(proofs)
    attrs |= _constraint_attributes(attrs, trace)
    if "changes_outside" in attrs:
        attrs["changes_outside"] = [_measured_again(change, trace) for change in attrs["changes_outside"]]
    # Each remark once: a part may have too few tokens to show what another one does.
    remarks = [remark for run in runs for remark in run.attrs.get("remarks", ())]
    if remarks:
        attrs["remarks"] = list(
            {(of["kind"], str(of["connections"])): of for of in reversed(remarks)}.values()
        )[::-1]
    # What was tried on one part's first batch, of what that part alone let suspect, is nothing about all of them.
    attrs = {name: value for name, value in attrs.items() if name not in OF_ONE_PART}
    attrs |= _joined_inputs(runs)
    attrs["sampling"] = {
        **_sampling(runs[0]),
        "sequences_seen": sum(int(_sampling(run)["sequences_seen"]) for run in runs),
        "sequences_kept": trace.sizes["sample"],
    }
    digests = [str(run.attrs.get("data_digest")) for run in runs]
    if len(set(digests)) > 1:
        attrs["data_digest"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    fired = coverage["fired"].values >= coverage["expected"].values
    expected = coverage["expected"].values > 0
    attrs |= {"sites_expected": int(expected.sum()), "sites_fired": int((fired & expected).sum())}
    return attrs | {"merged_runs": len(runs)}


OF_ONE_PART = ("consequences", "task", "distinct_tokens", "rescaled", "scale_slopes")


def _joined_inputs(runs: Sequence[xr.DataTree]) -> dict[str, Any]:
    """The task with the mean loss of all parts, and how many different tokens came in at least."""
    found: dict[str, Any] = {}
    shares = [int(_sampling(run)["sequences_seen"]) for run in runs]
    tasks = [run.attrs.get("task") for run in runs]
    if all(isinstance(task, Mapping) for task in tasks):
        losses = [float(task["loss"]) for task in tasks]  # type: ignore[index]
        rest = [{name: value for name, value in task.items() if name != "loss"} for task in tasks]  # type: ignore[union-attr]
        if all(one == rest[0] for one in rest):
            found["task"] = rest[0] | {"loss": float(np.average(losses, weights=shares))}
    counts = [run.attrs.get("distinct_tokens") for run in runs]
    if all(isinstance(count, Mapping) for count in counts):
        each = [float(count["per_sequence"]) for count in counts]  # type: ignore[index]
        most = max(float(count["in_all"]) for count in counts)  # type: ignore[index]
        found["distinct_tokens"] = {"per_sequence": float(np.average(each, weights=shares)), "in_all": most}
    return found


def _constraint_attributes(attrs: Mapping[str, Any], trace: xr.Dataset) -> dict[str, Any]:
    """What the matrices of the joined sample satisfy, and the family that is called by it."""
    matrices = trace.get("h_res")
    if matrices is None or attrs.get("family") not in MEASURED or "constraint" not in attrs:
        return {}
    mask = trace["mask"].transpose("sample", "token").values
    precision = getattr(torch, str(attrs.get("autocast", attrs["dtype"])))
    found = measured_constraint([torch.from_numpy(of_one.values[mask]) for of_one in matrices], precision)
    if found is None:
        return {}
    unsure = " (rows and columns may be exchanged)"
    ending = unsure if str(attrs["constraint"]).endswith(unsure) else ""
    # Where the sample that named it had not these sums, the name comes from the operations that make the matrices.
    is_made = attrs["family"] == "mhc" and not str(attrs["constraint"]).startswith("doubly stochastic")
    detected = "mhc" if is_made else "hc"
    return {"family": measured_family(detected, found), "constraint": found.words + ending}


def _measured_again(change: Mapping[str, Any], trace: xr.Dataset) -> dict[str, Any]:
    """A change of the streams outside of the connections, over all sequences of the joined trace."""
    depths = trace["depth"].values.tolist()
    connected = trace["depth_out"].values.tolist() if "depth_out" in trace else []
    # What is added besides a connection is no difference of states.
    if change["depth_out"] in connected or not {change["depth_in"], change["depth_out"]} <= set(depths):
        return dict(change)
    before, after = (
        torch.from_numpy(trace["residual"].values[depths.index(change[name])].ravel())
        for name in ("depth_in", "depth_out")
    )
    return {**change, "change": relative_error(after.double() - before.double(), before)}
