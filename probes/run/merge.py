"""How do several runs become one, without the model? Parts of the data are joined, streamed sums added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations, pairwise
from typing import Any

import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.probes.connections.constraint import MEASURED
from depthscope.probes.run.pipeline_stages import STAGE, join_stages
from depthscope.probes.run.shards import are_shards, join_shards
from depthscope.probes.statistics.stored_sums import HASH, SKETCH_VARIABLES, restore_sums
from depthscope.probes.statistics.streamed_spectra import streamed_variables
from depthscope.probes.statistics.streamed_sums import StreamedSums

# Attributes that runs of one model share. Not the precision or the seed: sums of either may be added.
MODEL_ATTRIBUTES = ("model", "family", "block", "num_blocks", "num_parameters", "n_streams", "layout")


def merge_runs(runs: Sequence[xr.DataTree]) -> xr.DataTree:
    """Make one run of several runs of one model, such as those of processes on parts of the data.

    Runs that number their sequences within the whole, as ``depthscope probe --shard k/N`` and ``first_sequence=`` do, are
    joined: the sample, the statistics and the coverage are those of one run over everything. Of others the streamed sums are
    added, and everything else is the first run's: its sampled states, the rows of its steps and its attributes;
    ``merged_tokens`` is added.

    The runs of a pipeline's stages (``capture(…, stage=(k, n))``) are joined along the depth: see `join_stages`.

    Parameters
    ----------
    runs : sequence of DataTree
        Parts of one whole in any order; or captured with ``streaming=True``, over different sequences, with the same
        weights. Where two of these have sequences of the same number, their sketches cannot be added: then ``hsic`` is left
        out, and ``merged_without`` gives the reason; ``streaming={"first_sequence": …}`` gives them different numbers.

    Returns
    -------
    DataTree

    Raises
    ------
    InputError
        For fewer than two runs, for runs of different models, weights, depths or hashes, for the same data twice, for a
        missing part, and for a run that stores no sums.
    """
    if len(runs) < 2:
        raise InputError(f"got {len(runs)} run; expected at least two, to be added")
    if any(STAGE in run.attrs for run in runs):
        return join_stages(runs)
    for first, other in pairwise(runs):
        _require_same_model(first.attrs, other.attrs)
    if are_shards(runs):
        return join_shards(runs, _merged_statistics)
    _require_different_data(runs)
    nodes = dict(runs[0].to_dict())
    reasons, counts = [], []
    for chain in schema.chains(runs[0]):
        statistics, reason = _merged_statistics([_chain_statistics(run, chain) for run in runs], chain)
        nodes[f"/statistics/{chain}".rstrip("/")] = statistics
        reasons.append(reason)
        counts.append(int(statistics.streamed_count.values.max()))
    merged = xr.DataTree.from_dict(nodes)
    merged.attrs = {**runs[0].attrs, "merged_runs": len(runs), "merged_tokens": counts[0]}
    if any(reasons):
        merged.attrs["merged_without"] = next(filter(None, reasons))
    schema.validate(merged)
    return merged


def _require_same_model(first: Mapping[Any, Any], other: Mapping[Any, Any]) -> None:
    digests = (first.get("weights_digest"), other.get("weights_digest"))
    if None not in digests and digests[0] != digests[1]:  # None: sharded weights, of which no digest exists
        raise InputError(
            "the runs were measured with other weights (weights_digest differs); expected runs of one model at one step"
        )
    for name in MODEL_ATTRIBUTES:
        # Which of these a family is called is measured on each part of the data, and may be decided by one token.
        if name == "family" and {first.get(name), other.get(name)} <= MEASURED:
            continue
        if first.get(name) != other.get(name):
            raise InputError(
                f"{name} is {first.get(name)!r} in one run and {other.get(name)!r} in another; expected runs of one model"
            )


def _require_different_data(runs: Sequence[xr.DataTree]) -> None:
    digests = [run.attrs.get("data_digest") for run in runs]
    # Every pair, not neighbours alone: the same data may come first and last.
    for (i, a), (j, b) in combinations(enumerate(digests), 2):
        if a == b:
            raise InputError(
                f"runs {i} and {j} show the same sequences (data_digest {str(a)[:12]}); expected parts of the data, "
                "each token in one of them"
            )


def _chain_statistics(run: xr.DataTree, chain: str) -> xr.Dataset:
    found = schema.chain_dataset(run, "statistics", chain)
    if found is None:
        raise InputError(
            f"a run has no statistics of {chain or 'its chain'}; expected the same chains in all runs"
        )
    return found


def _merged_statistics(parts: Sequence[xr.Dataset], chain: str) -> tuple[xr.Dataset, str]:
    """The first part's statistics with the streamed ones of all parts, and why there is no HSIC among them."""
    depths = parts[0]["depth"].values.tolist()
    for part in parts[1:]:
        if part["depth"].values.tolist() != depths:
            raise InputError(
                f"depths are {depths} and {part['depth'].values.tolist()}; expected the same {chain or 'ones'}"
            )
    sums = [restore_sums(part) for part in parts]
    reason = _why_no_sketch(parts, sums)
    if reason:
        for of in sums:
            of.sketches = {}
    variables, coords = streamed_variables(reduce(StreamedSums.merged_with, sums), depths)
    # All streamed variables go, not only those that are replaced: an HSIC that cannot be merged must not stay.
    streamed = (*schema.OF_STREAMING, *SKETCH_VARIABLES, "other_depth")
    others = parts[0].drop_vars([name for name in parts[0].variables if name in streamed])
    return others.assign(variables).assign_coords(coords), reason


def _why_no_sketch(parts: Sequence[xr.Dataset], sums: Sequence[StreamedSums]) -> str:
    """Why the sketches cannot be added; empty where they can."""
    if not all(of.sketches for of in sums):
        return "hsic: a run has no sketch over all its depths"
    for part in parts:
        if part["sum_sign"].attrs["hash"] != HASH:
            raise InputError(
                f"a run's sketch is by {part['sum_sign'].attrs['hash']!r}; expected {HASH!r}: capture it anew"
            )
    # Equal numbers give equal signs: products of two different tokens would no longer average out.
    ranges = sorted(span for of in sums for span in of.sequences)
    if any(end > start for (_, end), (start, _) in pairwise(ranges)):
        return "hsic: the runs use the same sequence numbers, so that signs of different tokens are not independent"
    return ""
