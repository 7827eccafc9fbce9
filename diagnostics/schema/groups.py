"""Where in a run is a dataset? The groups of the tree, the chains below them, and what their metrics are."""

from __future__ import annotations

import xarray as xr

GROUPS = ("trace", "statistics", "metrics", "coverage")

COMPLETE = "complete"
"""Attribute of /metrics: true where they are all that the run can feed."""


def chains(run: xr.DataTree) -> list[str]:
    """Names of the residual chains of a run; ``[""]`` where there is one."""
    # Not the first group only: the coverage of all chains is one dataset, and a run may have no trace.
    for group in GROUPS:
        if group in run.children and run[group].children:
            return list(run[group].children)
    return [""]


def chain_dataset(run: xr.DataTree, group: str, chain: str = "") -> xr.Dataset | None:
    """The dataset of one group and chain, or None where the run does not have it.

    ``group``: ``"trace"``, ``"statistics"`` or ``"metrics"``.
    ``chain``: a name of `chains`.
    """
    if group not in run.children or (chain and chain not in run[group].children):
        return None
    dataset = run[group_path(group, chain)].to_dataset()
    return dataset if dataset.variables else None  # the node above several chains is empty


def by_chain(analysis: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """The analyses of a run by the names of its chains; the empty name where it has one."""
    if isinstance(analysis, xr.DataTree) and analysis.children:
        return {chain: node.to_dataset() for chain, node in analysis.children.items()}
    return {"": analysis if isinstance(analysis, xr.Dataset) else analysis.to_dataset()}


def group_path(group: str, chain: str) -> str:
    """The path of a group's dataset below the root; a run with one chain has no level of chains.

    ``group, chain``: a name of `GROUPS` and one of `chains`.

    Examples
    --------
    >>> group_path("trace", ""), group_path("trace", "decoder")
    ('trace', 'trace/decoder')
    """
    return f"{group}/{chain}" if chain else group
