"""Which tensors does a safetensors file contain? Its header, every number of which is checked against the file's size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.errors import CheckpointError, first_line
from depthscope.probes.checkpoints.own_files import require_file

LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, little-endian
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
MOST_DIMENSIONS = 64  # of a numpy array
BITS = {
    **dict.fromkeys(("F4", "E2M1"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Size of one element, by the name of its type."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it; its data are the file's bytes from ``start`` to ``stop``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int


def torn_file(file: Path, reason: str) -> CheckpointError:
    """The error for a damaged safetensors file."""
    return CheckpointError(f"'{file}' is torn or no safetensors file ({reason}); copy or download it again")


def read_header(file: Path, *, complete: bool = True) -> list[StoredTensor]:
    """The tensors of a safetensors file, without their data.

    ``complete``: whether the data must be there; without them it is a partial download, of which the header is known.
    Raises CheckpointError: If a length, offset, shape or type does not fit the file, tensors overlap, or a name comes
    twice.
    """
    size = require_file(file).stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        # A file of another kind gives any length: never read more than there is.
        if not 0 < length <= min(size - LENGTH_BYTES, HEADER_LIMIT):
            # by its limit first: 20 GiB are too long in a file of any size
            reason = "larger than the format allows" if length > HEADER_LIMIT else "longer than the file"
            raise torn_file(file, f"its header has {length} bytes and is {reason}" if length else "no header")
        text = opened.read(length)
    first = LENGTH_BYTES + length  # offsets count from the end of the header
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(entries, dict):
            raise InputError(f"it is a {type(entries).__name__}, not an object")
        notes = entries.get("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise InputError("its metadata are not texts")
        tensors = [
            _tensor(name, entry, file, first) for name, entry in entries.items() if name != "__metadata__"
        ]
        _require_room(tensors, size if complete else None)
    except (ValueError, TypeError, RecursionError) as error:
        raise torn_file(file, f"its header cannot be read: {first_line(error)}") from error
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InputError("it has a name twice")
    return found


def _tensor(name: str, entry: Any, file: Path, first: int) -> StoredTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{ascii(name)[:80]} is not an entry of a tensor")
    if not name.isprintable():  # names are printed, and an escape sequence would reach the terminal
        raise InputError(f"{ascii(name)[:80]} is not a name of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype or not _are_sizes(shape) or not _are_sizes(offsets):
        raise InputError(f"the type, shape or offsets of {ascii(name)[:80]} are no such")
    if len(shape) > MOST_DIMENSIONS or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"the shape or offsets of {ascii(name)[:80]} are impossible")
    # A type that is not known here has no size to compare; whoever reads its values refuses it.
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise InputError(f"the shape of {ascii(name)[:80]} does not fit its bytes")
    return StoredTensor(name, tuple(shape), dtype, file, first + offsets[0], first + offsets[1])


def _are_sizes(values: Any) -> bool:
    # by type, since True is an int too; below 2⁶³, what a file's offset can be
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _require_room(tensors: Iterable[StoredTensor], size: int | None) -> None:
    stop = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start < stop:
            raise InputError(f"{ascii(tensor.name)[:80]} overlaps another tensor")
        stop = tensor.stop
    if size is not None and stop > size:
        raise InputError(f"it describes {stop} bytes, but the file has {size}")
