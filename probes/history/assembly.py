"""How do the runs of several checkpoints become one history? Metrics and statistics by step, states of the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.analysis.training_curves import training_curves
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.history.references import SAMPLED, compared_states

CHECKPOINTS = "checkpoints"
"""Attribute of a history: step, name and digest of each checkpoint in it."""


def assembled(parts: Sequence[xr.DataTree], last: xr.DataTree, attrs: Mapping[str, Any]) -> xr.DataTree:
    """The history of several checkpoints.

    ``parts``: one for each checkpoint, in the order of their steps.
    ``last``: A run with the trace of the last one.
    Returns: ``/metrics`` and ``/statistics`` by step; ``/trace`` and ``/coverage`` of the last checkpoint.
    """
    nodes = {
        path.strip("/"): node
        for path, node in last.to_dict().items()
        if path.startswith(("/trace", "/coverage"))
    }
    for chain in schema.chains(last):
        for group in ("statistics", "metrics"):
            found = [schema.chain_dataset(part, group, chain) for part in parts]
            nodes[group_path(group, chain)] = _by_step([each for each in found if each is not None])
        place = group_path("statistics", chain)
        nodes[place] = _compared_with_last(nodes[place])
    run = xr.DataTree.from_dict({**nodes, "/": xr.Dataset(attrs={**parts[-1].attrs, **attrs})})
    for chain in schema.chains(last):
        place = group_path("metrics", chain)
        run[place] = xr.DataTree(_with_curves(nodes[place], training_curves(run, chain=chain)))
    schema.validate(run)
    return run


def _by_step(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """What has a step of all parts, and what has none of the last one."""
    last = parts[-1]
    whole = last.drop_dims("step")
    of_steps = [part[[name for name in part.data_vars if "step" in part[name].dims]] for part in parts]
    # A metric that a checkpoint lacks is NaN there.
    joined = xr.concat(
        of_steps, "step", join="outer", coords="minimal", compat="override", combine_attrs="override"
    )
    for name in joined.data_vars:
        # As each part has it, and of the last one that has it: what is true of one step alone.
        joined[name].attrs = next(part[name].attrs for part in reversed(of_steps) if name in part)
    return whole.merge(joined, compat="override", join="outer").assign_attrs(last.attrs)


def _compared_with_last(statistics: xr.Dataset) -> xr.Dataset:
    """The statistics with the CKA to the last checkpoint in place of the sampled states, which stay in the parts."""
    states = statistics[SAMPLED].transpose("step", "depth", ...).values
    found = np.stack([compared_states(each, states[-1])[0] for each in states])
    return statistics.drop_vars(SAMPLED).assign(last_state_cka=(schema.DEPTH_STEP, found))


def _with_curves(metrics: xr.Dataset, curves: xr.Dataset) -> xr.Dataset:
    """The metrics of all steps, with those that only the statistics of a history give."""
    added = {
        name: curves[name]
        for name in curves.data_vars
        if name not in metrics and "stream" not in curves[name].dims
    }
    reasons = {name: why for name, why in metrics.attrs.get("not_computed", {}).items() if name not in added}
    return metrics.assign(added).assign_attrs(not_computed=reasons)
