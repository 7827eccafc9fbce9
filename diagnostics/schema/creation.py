"""How is a run put together? Datasets by group and chain become one validated tree."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import xarray as xr

from depthscope.diagnostics.schema.groups import group_path
from depthscope.diagnostics.schema.validation import SCHEMA_VERSION, validate

Parts = xr.Dataset | Mapping[str, xr.Dataset] | None


def create_run(
    trace: Parts = None,
    *,
    statistics: Parts = None,
    metrics: Parts = None,
    coverage: xr.Dataset | None = None,
    attrs: Mapping[str, Any],
) -> xr.DataTree:
    """Make a validated run of datasets.

    Parameters
    ----------
    trace, statistics, metrics : Dataset or mapping of chain name to Dataset, optional
        The groups; a mapping makes one child group per chain.
    coverage : Dataset, optional
        Which sites fired.
    attrs : mapping
        Attributes of the run; ``schema_version`` and ``created`` are added.

    Returns
    -------
    DataTree

    Raises
    ------
    SchemaError
        Where a group breaks the contract.
    """
    groups = {"trace": trace, "statistics": statistics, "metrics": metrics, "coverage": coverage}
    nodes: dict[str, xr.Dataset] = {}
    for group, part in groups.items():
        if part is None:
            continue
        # One chain has no name, and no level of its own in the tree.
        by_chain = {"": part} if isinstance(part, xr.Dataset) else part
        for chain, dataset in by_chain.items():
            nodes[group_path(group, chain)] = dataset
    stamped = {"schema_version": SCHEMA_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    # The caller's attributes last: a merged or converted run states its own time of creation.
    run = xr.DataTree.from_dict({"/": xr.Dataset(attrs={**stamped, **attrs}), **nodes})
    validate(run)
    return run
