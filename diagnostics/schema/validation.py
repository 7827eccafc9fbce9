"""Is this a run? Its version, groups, dims and dtypes, and how much a file may ask for."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.atomic_writes import kind_of
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.coefficients import OVER_DEPTH, PLAIN_FACTORS
from depthscope.diagnostics.schema.groups import GROUPS, chain_dataset, chains, group_path
from depthscope.diagnostics.schema.variables import (
    AFTER_SUM,
    COVERAGE,
    SITES,
    STATISTICS,
    TRACE,
    TRACE_COORDS,
    Variable,
)

# The first number grows where older versions cannot read a run, the second where variables are added.
SCHEMA_VERSION = "1.2"

# Without these nothing else of a group can be read: states need their padding, sums the number of their tokens.
_REQUIRED = {"trace": ("residual", "mask"), "statistics": ("token_count",), "metrics": (), "coverage": ()}
PROVEN = "proven"
UNPROVEN = "unproven: "
"""What an attribute ``proof`` is, or begins with."""

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
        if required not in dataset:
            raise SchemaError(
                f"{path} has no variable {required!r}; it has {sorted(map(str, dataset.variables))}"
            )
    # Variables that are not declared are allowed: a newer minor version, or the user's own.
    for name, declared in _DECLARED.get(group, {}).items():
        if name in dataset.variables:
            _validate_variable(dataset.variables[name], declared, f"{path}/{name}")
    if group == "trace":
        _validate_trace(dataset, path)


def _validate_variable(variable: xr.Variable, declared: Variable, path: str) -> None:
    if variable.dims != declared.dims:
        raise SchemaError(f"{path} has dims {variable.dims}, expected {declared.dims}")
    if variable.dtype.kind not in declared.kind:
        raise SchemaError(f"{path} has dtype {variable.dtype}, expected kind {declared.kind!r}")


def _validate_trace(trace: xr.Dataset, path: str) -> None:
    missing = [name for name in ("layer", "site", "module") if name not in trace.coords]
    if missing:
        raise SchemaError(f"{path} lacks the coordinates {missing} on depth")
    unknown = set(map(str, trace["site"].values)) - set(SITES)
    if unknown:
        raise SchemaError(f"{path} has sites {sorted(unknown)}, expected some of {SITES}")
    # xarray keeps one size for a dim: that these three dims are of the same streams is a rule of ours.
    streams = trace.sizes["stream"]
    for side in ("stream_out", "stream_in"):
        if trace.sizes.get(side, streams) != streams:
            raise SchemaError(
                f"{path}/h_res has {trace.sizes[side]} along {side}, but the run has {streams} streams"
            )
    _validate_statements(trace.attrs, path)
    _validate_linear_parts(trace, path)
    if "connection" in trace.dims and "depth_out" in trace.coords and _has_every_depth(trace):
        furthest = int(trace["depth_out"].max())
        if furthest >= trace.sizes["depth"]:
            raise SchemaError(
                f"{path}: a connection writes depth {furthest}, the last depth is {trace.sizes['depth'] - 1}"
            )


def _validate_statements(attrs: Mapping[Any, Any], path: str) -> None:
    """Check the statements of a run or a chain about its reading: whether it is proven, and what its matrices satisfy."""
    proof = attrs.get("proof", PROVEN)
    if not is_proof(proof):
        raise SchemaError(
            f"{path} has the proof {proof!r}; expected {PROVEN!r}, or {UNPROVEN!r} and the reason"
        )
    constraint = attrs.get("constraint", "unknown")
    if not (isinstance(constraint, str) and constraint.strip()):
        raise SchemaError(
            f"{path} has the constraint {constraint!r}; expected a description of what the matrices satisfy, such as "
            "'doubly stochastic within 1e-6', or no such attribute"
        )
    left_out = attrs.get("not_covered", [])
    if not (isinstance(left_out, (list, tuple)) and all(_says_something(part) for part in left_out)):
        raise SchemaError(
            f"{path} has not_covered {left_out!r}; expected a list of the parts that lie in no chain, each a dict with its "
            "'module' and a 'sentence' that says why"
        )


def _says_something(part: Any) -> bool:
    return isinstance(part, Mapping) and all(
        isinstance(part.get(key), str) and part[key].strip() for key in ("module", "sentence")
    )


def is_proof(text: Any) -> bool:
    """Whether a text states that something is proven, or that it is not and why.

    Examples
    --------
    >>> is_proof("proven"), is_proof("unproven: a branch was not seen"), is_proof("unproven: "), is_proof(True)
    (True, True, False, False)
    """
    if not isinstance(text, str):
        return False
    return text == PROVEN or bool(text.startswith(UNPROVEN) and text.removeprefix(UNPROVEN).strip())


def _validate_linear_parts(trace: xr.Dataset, path: str) -> None:
    """Check what dims and dtypes do not say about the parts of connections that are no streams."""
    factors = [name for name in PLAIN_FACTORS if name in trace]
    if factors and trace.sizes["stream"] != 1:
        raise SchemaError(
            f"{path} has {', '.join(factors)} and {trace.sizes['stream']} streams; factors are of plain connections, with "
            "one stream: those of streams are h_res and h_post"
        )
    over_depth = [name for name in OVER_DEPTH if name in trace]
    if over_depth and trace.sizes["source"] <= trace.sizes["connection"]:
        raise SchemaError(
            f"{path}/{over_depth[0]} has {trace.sizes['source']} sources and {trace.sizes['connection']} connections; "
            "expected at least one source more: the embedding, then the output of each"
        )
    if "read_depth" in trace.variables and "depth_in" in trace.coords:
        late = trace["read_depth"].values > trace["depth_in"].values
        if late.any():
            number = int(late.argmax())
            raise SchemaError(
                f"{path}: connection {number} reads depth {int(trace['read_depth'][number])}, after depth "
                f"{int(trace['depth_in'][number])}, which it is applied to"
            )
    _validate_texts(trace, path)


def _validate_texts(trace: xr.Dataset, path: str) -> None:
    """Check the coordinates of connections that are texts."""
    after = set(map(str, trace["after_sum"].values)) if "after_sum" in trace.variables else set()
    if after - set(AFTER_SUM):
        raise SchemaError(
            f"{path}/after_sum has {sorted(after - set(AFTER_SUM))}, expected some of {AFTER_SUM}"
        )
    proofs = trace["proof"].values.tolist() if "proof" in trace.variables else []
    odd = [text for text in proofs if not is_proof(text)]
    if odd:
        raise SchemaError(f"{path}/proof has {odd[0]!r}; expected {PROVEN!r}, or {UNPROVEN!r} and the reason")


def _has_every_depth(trace: xr.Dataset) -> bool:
    """Whether the depths are 0 … D with the last block's output at the end, so that depth_out must be among them.

    A capture of some sites has gaps; a final norm or a state that is changed before the next block comes after the last
    connection.
    """
    depths = trace["depth"].values.tolist()
    return str(trace["site"].values[-1]) == "post" and depths == list(range(len(depths)))


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
_FREE_BYTES = 256 << 20
_RATIO = 32


@dataclass(frozen=True)
class Limit:
    """Bytes that the arrays of a run may have in memory, and where that number is from."""

    max_bytes: int  # the limit
    reason: str  # for the message: what set it

    @classmethod
    def of(cls, stored: int, max_bytes: int | None) -> Limit:
        """The limit that was asked for, or else what the bytes on disk can account for."""
        if max_bytes is not None:
            return cls(max_bytes, f"the limit of {max_bytes} bytes that was asked for")
        allowed = _FREE_BYTES + _RATIO * stored
        return cls(
            allowed, f"the {allowed} bytes that {stored} stored bytes can account for; raise it by max_bytes"
        )

    def check(self, declared: int) -> None:
        """Refuse arrays whose shapes and dtypes ask for more bytes than the limit."""
        if declared > self.max_bytes:
            raise SchemaError(f"its arrays need {declared} bytes, more than {self.reason}")


def require_dense(path: Path, entry: os.stat_result) -> None:
    """Refuse a file with far more bytes than the disk holds of it: a hole of a terabyte takes no room there."""
    # Windows does not know. 16 MiB and 32 times: a file system may compress what is in it.
    held = 512 * getattr(entry, "st_blocks", entry.st_size)
    if entry.st_size > (16 << 20) + _RATIO * held:
        raise SchemaError(f"{path} has {entry.st_size} bytes, of which the disk holds {held}; copy it again")


def require_ordinary(path: Path, *, folder: bool) -> None:
    """Refuse what is no ordinary file (or folder): opening a pipe waits for ever, a device has no end; links are followed."""
    mode = os.stat(path).st_mode
    expected = "a folder" if folder else "a file"
    if (folder and stat.S_ISDIR(mode)) or (not folder and stat.S_ISREG(mode)):
        return
    raise SchemaError(f"it is {kind_of(mode)}; expected {expected}")
