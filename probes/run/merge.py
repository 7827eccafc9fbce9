"""What do two runs say together? Their streamed sums added, offline: the run of all their tokens, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations, pairwise
from typing import Any

import xarray as xr

from depthscope.diagnostics import schema
from depthscope.probes.statistics.stored_sums import HASH, SKETCH_VARIABLES, restore_sums
from depthscope.probes.statistics.streamed_spectra import streamed_variables
from depthscope.probes.statistics.streamed_sums import StreamedSums

# What runs of the same model at the same place must share.
SAME = ("model", "family", "block", "num_blocks", "num_parameters", "n_streams", "layout")


def merge_runs(runs: Sequence[xr.DataTree]) -> xr.DataTree:
    """Add what several runs of one model streamed, such as its processes on parts of the data.

    All else is the first run's: its sampled states, the rows of its steps and its attributes; ``merged_tokens`` is added.

    Parameters
    ----------
    runs : sequence of DataTree
        Captured with ``streaming=True``, over different sequences, with the same weights. Where two of them number their
        sequences alike, their sketches cannot be added: then ``hsic`` is left out, and ``merged_without`` says why;
        ``streaming={"first_sequence": …}`` numbers them apart.

    Returns
    -------
    DataTree

    Raises
    ------
    ValueError
        For fewer than two runs, for runs of different models, weights, depths or hashes, for the same data twice, and for
        a run that keeps no sums.
    """
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} run; expected at least two, to be added")
    for first, other in pairwise(runs):
        _require_same(first.attrs, other.attrs)
    _require_other_data(runs)
    chains = schema.chains(runs[0])
    statistics = {chain: _merged([_statistics(run, chain) for run in runs], chain) for chain in chains}
    nodes = {f"/statistics/{chain}".rstrip("/"): dataset for chain, dataset in statistics.items()}
    merged = xr.DataTree.from_dict(runs[0].to_dict() | nodes)
    reasons = [dataset.attrs.pop("merged_without", "") for dataset in statistics.values()]
    count = next(iter(statistics.values())).streamed_count.values.max()
    merged.attrs = dict(runs[0].attrs) | {"merged_runs": len(runs), "merged_tokens": int(count)}
    merged.attrs |= {"merged_without": reasons[0]} if any(reasons) else {}
    schema.validate(merged)
    return merged


def _require_same(first: Mapping[Any, Any], other: Mapping[Any, Any]) -> None:
    weights = {of.get("weights_digest") for of in (first, other)}
    if len(weights) == 2 and None not in weights:
        raise ValueError(
            "the runs were measured with other weights (weights_digest differs); expected runs of one model at one step"
        )
    for name in SAME:
        if first.get(name) != other.get(name):
            raise ValueError(
                f"{name} is {first.get(name)!r} in one run and {other.get(name)!r} in another; expected runs of one model"
            )


def _require_other_data(runs: Sequence[xr.DataTree]) -> None:
    digests = [run.attrs.get("data_digest") for run in runs]
    for (i, a), (j, b) in combinations(enumerate(digests), 2):
        if a == b:
            raise ValueError(
                f"runs {i} and {j} show the same sequences (data_digest {str(a)[:12]}); expected parts of the data, "
                "each token in one of them"
            )


def _statistics(run: xr.DataTree, chain: str) -> xr.Dataset:
    found = schema.chain_dataset(run, "statistics", chain)
    if found is None:
        raise ValueError(
            f"a run has no statistics of {chain or 'its chain'}; expected the same chains in all runs"
        )
    return found


def _merged(parts: Sequence[xr.Dataset], chain: str) -> xr.Dataset:
    """The first part's statistics with the streamed ones of all."""
    depths = parts[0]["depth"].values.tolist()
    for part in parts[1:]:
        if part["depth"].values.tolist() != depths:
            raise ValueError(
                f"depths are {depths} and {part['depth'].values.tolist()}; expected the same {chain or 'ones'}"
            )
    streamings = [restore_sums(part) for part in parts]
    reason = _why_no_sketch(parts, streamings)
    if reason:
        for streaming in streamings:
            streaming.sketches = {}
    variables, coords = streamed_variables(reduce(StreamedSums.merged_with, streamings), depths)
    old = parts[0].drop_vars(
        [
            name
            for name in parts[0].variables
            if name in (*schema.OF_STREAMING, *SKETCH_VARIABLES, "other_depth")
        ]
    )
    return (
        old.assign(variables).assign_coords(coords).assign_attrs({"merged_without": reason} if reason else {})
    )


def _why_no_sketch(parts: Sequence[xr.Dataset], streamings: Sequence[StreamedSums]) -> str:
    if not all(streaming.sketches for streaming in streamings):
        return "hsic: a run has no sketch over all its depths"
    for part in parts:
        if part["sum_sign"].attrs["hash"] != HASH:
            raise ValueError(
                f"a run's sketch is by {part['sum_sign'].attrs['hash']!r}; expected {HASH!r}: capture it anew"
            )
    spans = sorted(span for streaming in streamings for span in streaming.sequences)
    if any(b > c for (_, b), (c, _) in pairwise(spans)):
        return "hsic: the runs number their sequences alike, so that signs of different tokens are not independent"
    return ""
