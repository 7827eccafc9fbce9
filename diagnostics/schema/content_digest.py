"""Is what was read what was saved? SHA-256 of every variable and of every group's attributes, stored with the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

CONTENT_DIGEST = "content_digest"
"""Attribute of the root on disk: path → digest. It is checked and taken off when a run is opened."""

# Bytes of an array in memory at once: a run may be larger than memory.
BLOCK = 16 << 20


def content_digest(run: xr.DataTree) -> dict[str, str]:
    """SHA-256 of every variable (name, role, dims, dtype, attributes, values) and of the attributes of every group.

    The digest is of what the labels and numbers are, not of how a format stores them: netCDF, Zarr and a repacked copy give
    the same one. Byte order and the payload of NaN do not count.

    Returns: Path, such as ``/trace/residual`` or ``/trace`` for the attributes of the group, → hexadecimal digest.
    """
    digests: dict[str, str] = {}
    for node in run.subtree:
        # Without inherited coordinates: they are of the parent, and are counted there.
        dataset = node.to_dataset(inherit=False)
        attrs = {key: value for key, value in dataset.attrs.items() if key != CONTENT_DIGEST}
        digests[node.path] = hashlib.sha256(_canonical_json(attrs)).hexdigest()
        for name, variable in dataset.variables.items():
            role = "coordinate" if name in dataset.coords else "variable"
            path = f"{node.path.rstrip('/')}/{name}"
            try:
                digests[path] = _variable_digest(variable, role)
            except Exception as error:
                # The libraries' own errors of a damaged chunk name no variable.
                error.add_note(f"in {path}")
                raise
    return digests


def describe_differences(found: Mapping[str, str], stored: Mapping[str, Any]) -> str:
    """What differs between two digests, as a phrase; empty where nothing does."""
    parts = {
        "changed": sorted(path for path in found if path in stored and found[path] != stored[path]),
        "missing": sorted(path for path in stored if path not in found),
        "added": sorted(path for path in found if path not in stored),
    }
    # Many are named by a few: the full list of a torn file would hide the sentence.
    return "; ".join(
        f"{kind}: {', '.join(paths[:5])}{f' and {len(paths) - 5} more' if len(paths) > 5 else ''}"
        for kind, paths in parts.items()
        if paths
    )


def _variable_digest(variable: xr.Variable, role: str) -> str:
    is_text = variable.dtype.kind in "OTU"
    # The three kinds of text are one: each format reads another.
    dtype = "text" if is_text else variable.dtype.newbyteorder("<").str
    header = [role, list(variable.dims), list(variable.shape), dtype, dict(variable.attrs)]
    digest = hashlib.sha256(_canonical_json(header))
    for block in _blocks(variable):
        if is_text:
            encoded = [str(text).encode("utf-8", "surrogatepass") for text in block.ravel().tolist()]
            # With their lengths: without them ["ab", "c"] and ["a", "bc"] would be the same.
            digest.update(np.array([len(text) for text in encoded], "<i8").tobytes())
            digest.update(b"".join(encoded))
        else:
            digest.update(_with_one_nan(np.ascontiguousarray(block, dtype)).data)
    return digest.hexdigest()


def _blocks(variable: xr.Variable) -> Iterator[np.ndarray]:
    """The values in C order, at most about `BLOCK` bytes at a time."""
    shape, inner = variable.shape, variable.dtype.itemsize
    if variable.ndim == 0 or 0 in shape:
        yield variable.values
        return
    # From the last axis: how many leading axes are walked through one by one.
    axis = variable.ndim - 1
    while axis > 0 and inner * shape[axis] <= BLOCK:
        inner *= shape[axis]
        axis -= 1
    length = max(1, BLOCK // inner)
    for leading in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], length):
            yield variable[(*leading, slice(start, start + length))].values


def _with_one_nan(block: np.ndarray) -> np.ndarray:
    """The same numbers with one NaN: reading and writing may change its sign and payload, which mean nothing."""
    if block.dtype.kind not in "fc":
        return block
    # A complex number is two real ones, each of which may be NaN.
    parts = block.view(block.real.dtype)
    undefined = np.isnan(parts)
    return np.where(undefined, parts.dtype.type(np.nan), parts) if undefined.any() else parts


def _canonical_json(value: Any) -> bytes:
    # Sorted: the formats keep attributes in different orders.
    return json.dumps(value, sort_keys=True, default=str).encode()
