"""Where in a run is a dataset? The groups of the tree, and the chains below them."""

from __future__ import annotations

import xarray as xr

from depthscope.diagnostics.schema.analysis import Analysis

GROUPS = ("trace", "statistics", "metrics", "coverage")


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
    Returns: Of metrics an `Analysis`.
    """
    if group not in run.children or (chain and chain not in run[group].children):
        return None
    dataset = run[group_path(group, chain)].to_dataset()
    if group == "metrics":  # as `analyze` returns them
        dataset = Analysis.of(dataset)
    return dataset if dataset.variables else None  # the node above several chains is empty


def group_path(group: str, chain: str) -> str:
    """The path of a group's dataset below the root; a run with one chain has no level of chains.

    ``group, chain``: a name of `GROUPS` and one of `chains`.

    Examples
    --------
    >>> group_path("trace", ""), group_path("trace", "decoder")
    ('trace', 'trace/decoder')
    """
    return f"{group}/{chain}" if chain else group
