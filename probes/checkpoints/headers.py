"""Which tensors does a checkpoint hold? Names, shapes and types from its headers; values only of those asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.weight_files import CheckpointError, safetensors_files

INDEX_ENDING = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, little-endian
SERIES = re.compile(r"-\d+-of-(\d+)$")
EXPECTED = (
    "expected a folder with .safetensors files (and their index, if there are several), or one such file"
)


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file tells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a checkpoint: those whose file is there, and the file of those whose is not."""

    tensors: dict[str, Stored]
    absent: dict[str, str]
    files: tuple[Path, ...]


def take_inventory(path: Path) -> Inventory:
    """Every tensor of a safetensors checkpoint, without its data.

    Parameters
    ----------
    path : Path
        A folder, one ``.safetensors`` file or an index. Shards that the index names may be absent: what they
        should hold is told.

    Returns
    -------
    Inventory

    Raises
    ------
    CheckpointError
        If there is no safetensors file, a header is torn, the index is none, or a series without an index
        is incomplete.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint at '{path}'; {EXPECTED}")
    index = _index_of(path)
    if index is not None:
        return _indexed(index)
    files = safetensors_files(path)
    if not files:
        raise CheckpointError(_nothing_in(path))
    _require_whole_series(files)
    return Inventory(_headers(files), {}, tuple(files))


def _index_of(path: Path) -> Path | None:
    if path.is_dir():
        return min(path.glob("*" + INDEX_ENDING), default=None)
    return path if path.name.endswith(INDEX_ENDING) else None


def _indexed(index: Path) -> Inventory:
    try:
        shards = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is no safetensors index ({error}); download it again") from error
    files = {name: index.parent / name for name in sorted(set(shards.values()))}
    there = {name: file for name, file in files.items() if file.is_file()}
    absent = {name: file for name, file in shards.items() if file not in there}
    return Inventory(_headers(there.values()), absent, tuple(files.values()))


def _nothing_in(path: Path) -> str:
    names = [path.name] if path.is_file() else sorted(file.name for file in path.iterdir())
    if any(name.endswith(PICKLES) for name in names):
        return (
            f"'{path}' holds pickles, whose tensors cannot be read one by one; load the model and save it again with "
            "save_pretrained(folder, safe_serialization=True), or its state dict with safetensors.torch.save_file"
        )
    found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if path.is_dir() else "one file"
    return f"'{path}' holds no safetensors (found: {found or 'nothing'}); {EXPECTED}"


def _require_whole_series(files: list[Path]) -> None:
    numbered = [found for file in files if (found := SERIES.search(file.stem))]
    expected = max((int(found.group(1)) for found in numbered), default=0)
    if len(numbered) < expected:
        raise CheckpointError(
            f"'{files[0].parent}' holds {len(numbered)} of {expected} shards and no index ({INDEX_ENDING[1:]}), so what "
            "is missing is not known; complete the download"
        )


def _headers(files: Iterable[Path]) -> dict[str, Stored]:
    return {tensor.name: tensor for file in files for tensor in _header(file)}


def _header(file: Path) -> list[Stored]:
    """The tensors that the header of a file names; it stays readable where the data behind it are missing."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        text = opened.read(length) if LENGTH_BYTES + length <= size else b""
    if not text:
        raise _torn(file, "its header is longer than the file")
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        return [_stored(name, entry, file, LENGTH_BYTES + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _torn(file, f"its header cannot be read: {error}") from error


def _stored(name: str, entry: dict[str, Any], file: Path, data: int) -> Stored:
    start, stop = entry["data_offsets"]
    return Stored(name, tuple(entry["shape"]), entry["dtype"], file, data + start, data + stop)


def _torn(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"'{file}' is torn or no safetensors file ({reason}); copy or download it again")


def read_values(tensors: Iterable[Stored]) -> dict[str, np.ndarray]:
    """Values of some tensors in float64; no other byte of their files is touched.

    Parameters
    ----------
    tensors : iterable of Stored
        Which.

    Returns
    -------
    dict of str to ndarray
        By name.

    Raises
    ------
    CheckpointError
        If the file of one is torn, its type is no floating one, or a value is not finite.
    """
    return {tensor.name: _finite(tensor.name, _values(tensor)) for tensor in tensors}


def _values(tensor: Stored) -> np.ndarray:
    """Read from the file itself: mapping a whole shard fails where it is larger than the memory."""
    if tensor.dtype not in NUMPY_TYPES:
        raise CheckpointError(
            f"'{tensor.name}' is stored as {tensor.dtype}; expected one of {', '.join(NUMPY_TYPES)}: take a checkpoint whose "
            "connections are not quantised"
        )
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.start)
        raw = np.frombuffer(opened.read(tensor.stop - tensor.start), np.uint8)
    kind = np.dtype(NUMPY_TYPES[tensor.dtype])
    if raw.size != kind.itemsize * math.prod(tensor.shape):
        raise _torn(tensor.file, f"it ends before the data of '{tensor.name}'")
    stored = raw.view(kind)
    if tensor.dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64).reshape(tensor.shape)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    broken = int(np.sum(~np.isfinite(values)))
    if broken:
        raise CheckpointError(
            f"{broken} of the {values.size} values of '{name}' are NaN or infinite: the training has diverged, or the "
            "file is broken; take an earlier checkpoint"
        )
    return values
