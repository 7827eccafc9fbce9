"""Is this a run? Its version, groups, dims and dtypes, and how much a file may ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.groups import GROUPS, chain_dataset, chains, group_path
from depthscope.diagnostics.schema.variables import (
    COVERAGE,
    OVER_DEPTH,
    PLAIN_FACTORS,
    PROVEN,
    STATISTICS,
    TRACE,
    TRACE_COORDS,
    UNPROVEN,
    Variable,
)

# The first number grows where older versions cannot read a run, the second where variables are added.
SCHEMA_VERSION = "1.2"

# Without these nothing else of a group can be read: states need their padding, sums the number of their tokens.
_REQUIRED = {
    "trace": ("residual", "mask", "layer", "site", "module"),
    **{"statistics": ("token_count",), "metrics": (), "coverage": ()},
}

_DECLARED: dict[str, dict[str, Variable]] = {
    "trace": TRACE | TRACE_COORDS,
    "statistics": STATISTICS,
    "coverage": COVERAGE,
}


class SchemaError(InputError):
    """A file or tree is not a run that this version can read."""


def validate(run: xr.DataTree) -> None:
    """Check a run against the contract.

    ``run``: a tree that claims to be a run.
    Raises SchemaError: For a foreign tree, a newer version, or a variable with the wrong dimensions or type.
    """
    check_version(run.attrs)
    _validate_statements(run.attrs, "/")
    for name in run.children:
        if name not in GROUPS:
            raise SchemaError(f"unknown group /{name}; expected some of {', '.join('/' + g for g in GROUPS)}")
    for group in GROUPS:
        for chain in chains(run):
            dataset = chain_dataset(run, group, chain)
            if dataset is not None:
                _validate_group(dataset, group, f"/{group}/{chain}".rstrip("/"))


def check_version(attrs: Mapping[Any, Any]) -> None:
    """Refuse a tree without a version, or with a newer major version than this one.

    Raises SchemaError: With what came, what was expected and what to do.
    """
    version = attrs.get("schema_version")
    if version is None:
        raise SchemaError(
            "not a depthscope run: the attribute schema_version is missing; "
            "make one with ds.capture(...) and ds.save_run(...)"
        )
    try:
        # Newer minor versions add variables only, which are not checked; numbers, not text: 10 is above 9.
        major = int(str(version).split(".")[0])
    except ValueError:
        raise SchemaError(
            f"schema_version {version!r} is not a version; expected such as {SCHEMA_VERSION}"
        ) from None
    if major > int(SCHEMA_VERSION.split(".")[0]):
        raise SchemaError(
            f"the run has schema version {version}, this depthscope reads up to {SCHEMA_VERSION}; "
            "read it with a newer depthscope"
        )


def _validate_group(dataset: xr.Dataset, group: str, path: str) -> None:
    for required in _REQUIRED[group]:
        if required not in dataset.variables:
            raise SchemaError(
                f"{path} has no variable {required!r}; it has {sorted(map(str, dataset.variables))}"
            )
    # Variables that are not declared are allowed: a newer minor version, or the user's own.
    for name, declared in _DECLARED.get(group, {}).items():
        if name in dataset.variables:
            _validate_variable(dataset.variables[name], declared, f"{path}/{name}")
    if group == "trace":
        _validate_statements(dataset.attrs, path)
        _validate_sizes(dataset, path)
        _validate_order(dataset, path)


def _validate_variable(variable: xr.Variable, declared: Variable, path: str) -> None:
    if variable.dims != declared.dims:
        raise SchemaError(f"{path} has dims {variable.dims}, expected {declared.dims}")
    if variable.dtype.kind not in declared.kind:
        raise SchemaError(f"{path} has dtype {variable.dtype}, expected kind {declared.kind!r}")
    texts = {str(text) for text in variable.values.ravel().tolist()} if declared.allowed else set()
    if odd := sorted(text for text in texts if not _is_allowed(text, declared.allowed)):
        raise SchemaError(f"{path} has {odd[0]!r}; expected some of {declared.allowed}")


def _is_allowed(text: str, allowed: Sequence[str]) -> bool:
    """Whether a text is one of those that are allowed, or begins with one that ends in a colon, and goes on."""
    return any(
        text.startswith(each) and bool(text.removeprefix(each).strip())
        if each.endswith(": ")
        else text == each
        for each in allowed
    )


def _validate_statements(attrs: Mapping[Any, Any], path: str) -> None:
    """Check the statements of a run or a chain about its reading: whether it is proven, and what its matrices satisfy."""
    proof, constraint = attrs.get("proof", PROVEN), attrs.get("constraint", "unknown")
    if not (isinstance(proof, str) and _is_allowed(proof, (PROVEN, UNPROVEN))):
        raise SchemaError(
            f"{path} has the proof {proof!r}; expected {PROVEN!r}, or {UNPROVEN!r} and the reason"
        )
    if not (isinstance(constraint, str) and constraint.strip()):
        raise SchemaError(
            f"{path} has the constraint {constraint!r}; expected a description of what the matrices satisfy, such as "
            "'doubly stochastic within 1e-6', or no such attribute"
        )


def _validate_sizes(trace: xr.Dataset, path: str) -> None:
    """Check what dims and dtypes do not say: how many there are of what belongs together."""
    sizes, streams = trace.sizes, trace.sizes["stream"]
    # xarray keeps one size for a dim: that these three dims are of the same streams is a rule of ours.
    for side in ("stream_out", "stream_in"):
        if sizes.get(side, streams) != streams:
            raise SchemaError(
                f"{path}/h_res has {sizes[side]} along {side}, but the run has {streams} streams"
            )
    factors = [name for name in PLAIN_FACTORS if name in trace]
    if factors and streams != 1:
        raise SchemaError(
            f"{path} has {', '.join(factors)} and {streams} streams; factors are of plain connections, with one stream: those "
            "of streams are h_res and h_post"
        )
    over_depth = [name for name in OVER_DEPTH if name in trace]
    if over_depth and sizes["source"] <= sizes["connection"]:
        raise SchemaError(
            f"{path}/{over_depth[0]} has {sizes['source']} sources and {sizes['connection']} connections; expected at least "
            "one source more: the embedding, then the output of each"
        )


def _validate_order(trace: xr.Dataset, path: str) -> None:
    """Check that connections write a depth that there is."""
    # Where the depths are 0 … D with the last block's output at the end: a capture of some sites has gaps, and a final norm or
    # a state that is changed before the next block comes after the last connection.
    depths = trace["depth"].values.tolist()
    has_every = str(trace["site"].values[-1]) == "post" and depths == list(range(len(depths)))
    if has_every and "connection" in trace.dims and "depth_out" in trace.coords:
        furthest = int(trace["depth_out"].max())
        if furthest >= len(depths):
            raise SchemaError(
                f"{path}: a connection writes depth {furthest}, the last depth is {len(depths) - 1}"
            )


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


# Heuristics of ours, far above the largest run that was tried (96 layers, 900 variables a group) and small enough that
# looking at as many takes less than a few seconds.
MAX_GROUPS, MAX_VARIABLES = 256, 20_000
MAX_FILES = 100_000
MAX_TEXT = 16 << 20
"""Bytes of one metadata file of Zarr."""

# States hardly get smaller by compression; rows of NaN, of what was not measured in most steps, do.
FREE_BYTES = 256 << 20
RATIO = 32


def require_room(declared: int, stored: int, max_bytes: int | None = None) -> None:
    """Refuse arrays that need more bytes than were asked for, or else than the bytes on disk can account for."""
    allowed = FREE_BYTES + RATIO * stored
    reason = f"the {allowed} bytes that {stored} stored bytes can account for; raise it by max_bytes"
    if max_bytes is not None:
        allowed, reason = max_bytes, f"the limit of {max_bytes} bytes that was asked for"
    if declared > allowed:
        raise SchemaError(f"its arrays need {declared} bytes, more than {reason}")


def require_dense(path: Path, entry: os.stat_result) -> None:
    """Refuse a file with far more bytes than the disk holds of it: a hole of a terabyte takes no room there."""
    # Windows does not know. 16 MiB and 32 times: a file system may compress what is in it.
    held = 512 * getattr(entry, "st_blocks", entry.st_size)
    if entry.st_size > (16 << 20) + RATIO * held:
        raise SchemaError(f"{path} has {entry.st_size} bytes, of which the disk holds {held}; copy it again")
