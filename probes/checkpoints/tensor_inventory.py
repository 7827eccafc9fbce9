"""Which tensors are in a checkpoint? Names, shapes and types from its headers; values only of those requested."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.gguf_tensors import dequantised, gguf_tensors
from depthscope.probes.checkpoints.own_files import exists, list_folder, own_file, require_file
from depthscope.probes.checkpoints.safetensors_header import StoredTensor, read_header, torn_file
from depthscope.probes.checkpoints.weight_files import (
    INDEX_ENDING,
    find_index,
    named_files,
    read_index,
    safetensors_files,
)

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: read as bits
SHARD_OF_SERIES = re.compile(r"-\d+-of-(\d+)$")
GGUF = ".gguf"
EXPECTED = "expected a folder with .safetensors files (and their index, if there are several), one such file, or a .gguf file"


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a checkpoint: those in files that exist, and the file names of those in missing ones."""

    tensors: dict[str, StoredTensor]
    absent: dict[str, str]
    files: tuple[Path, ...]
    settings: dict[str, Any] | None = None
    """The configuration, where the files themselves contain it, as GGUF does."""


def take_inventory(path: Path) -> Inventory:
    """List every tensor of a safetensors or GGUF checkpoint, without its data.

    ``path``: A folder, one ``.safetensors`` or ``.gguf`` file or an index. Shards that the index names may be missing:
    their tensors are listed as absent.
    Raises CheckpointError: If there is no such file, a header is torn, the index is none, or a series without an index
    is incomplete.
    """
    if not exists(path):
        raise CheckpointError(f"no checkpoint at '{path}'; {EXPECTED}")
    if not path.is_dir():
        require_file(path)
    index = find_index(path)
    if index is not None:
        names = read_index(index)
        listed = named_files(index, names)
        present = {name: require_file(file) for name, file in listed.items() if exists(file)}
        absent = {tensor: name for tensor, name in names.items() if name not in present}
        return Inventory(_headers(present.values()), absent, tuple(listed.values()))
    files = safetensors_files(path)
    if not files:
        return _gguf_inventory(path)
    _require_complete_series(files)
    return Inventory(_headers(files), {}, tuple(files))


def _gguf_inventory(path: Path) -> Inventory:
    files = _gguf_files(path)
    if not files:
        raise CheckpointError(_advice_without_safetensors(path))
    _require_complete_series(files)
    tensors: dict[str, StoredTensor] = {}
    settings: dict[str, Any] = {}
    for file in files:
        found, its_settings = gguf_tensors(file)
        tensors |= {tensor.name: tensor for tensor in found}
        settings = its_settings | settings  # the first of a series has the model's, the others their number
    return Inventory(tensors, {}, tuple(files), settings)


def _gguf_files(path: Path) -> list[Path]:
    """A GGUF file with the others of its series, or those of a folder; empty where there is none."""
    if not path.is_dir() and path.suffix != GGUF:
        return []
    folder = path if path.is_dir() else path.parent
    series = SHARD_OF_SERIES.search(path.stem)
    if not path.is_dir() and not series:
        return [require_file(path)]
    files = [own_file(folder, file.name) for file in sorted(folder.glob(f"*{GGUF}"))]
    if series:
        return [
            file for file in files if SHARD_OF_SERIES.sub("", file.stem) == SHARD_OF_SERIES.sub("", path.stem)
        ]
    if len({SHARD_OF_SERIES.sub("", file.stem) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(
            f"'{path}' contains several GGUF checkpoints ({names}); give the file that is meant"
        )
    return files


def _advice_without_safetensors(path: Path) -> str:
    names = [path.name] if not path.is_dir() else [file.name for file in list_folder(path)]
    if any(name.endswith(PICKLES) for name in names):
        return (
            f"'{path}' contains pickles, whose tensors cannot be read one by one; load the model and save it again with "
            "save_pretrained(folder, safe_serialization=True), or its state dict with safetensors.torch.save_file"
        )
    found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if path.is_dir() else "one file"
    return f"'{path}' contains no safetensors (found: {found or 'nothing'}); {EXPECTED}"


def _require_complete_series(files: list[Path]) -> None:
    """Refuse shards named ``…-00001-of-00003`` of which some are missing: without an index their tensors are unknown."""
    numbered = [found for file in files if (found := SHARD_OF_SERIES.search(file.stem))]
    expected = max((int(found.group(1)) for found in numbered), default=0)
    if len(numbered) < expected:
        raise CheckpointError(
            f"'{files[0].parent}' contains {len(numbered)} of {expected} shards and no index ({INDEX_ENDING[1:]}), so what "
            "is missing is not known; complete the download"
        )


def _headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    # The data may be missing, as in a partial download: only the values of the connections are needed.
    return {tensor.name: tensor for file in files for tensor in read_header(file, complete=False)}


def read_values(tensors: Iterable[StoredTensor]) -> dict[str, np.ndarray]:
    """Read the values of some tensors as float64; no other byte of their files is read.

    Raises CheckpointError: If a file is torn, a type is not floating point, or a value is not finite.
    """
    return {tensor.name: _finite_values(tensor) for tensor in tensors}


def _finite_values(tensor: StoredTensor) -> np.ndarray:
    in_gguf = tensor.file.suffix == GGUF
    if tensor.dtype not in NUMPY_TYPES and not in_gguf:
        raise CheckpointError(
            f"'{tensor.name}' is stored as {tensor.dtype}; expected one of {', '.join(NUMPY_TYPES)}: take a checkpoint whose "
            "connections are not quantised"
        )
    if tensor.start == tensor.stop and math.prod(tensor.shape) == 0:
        raise CheckpointError(
            f"'{tensor.name}' has no values (its shape is {tensor.shape}); download the checkpoint again"
        )
    # Before reading: `read` takes the memory for all that it is asked for.
    if tensor.stop > tensor.file.stat().st_size:
        raise _ends_early(tensor)
    # By seek and read, not by a memory map of the shard: that fails where the shard is larger than the memory.
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.start)
        raw = np.frombuffer(opened.read(tensor.stop - tensor.start), np.uint8)
    values = _decoded(tensor, raw).astype(np.float64)
    num_broken = int(np.sum(~np.isfinite(values)))
    if num_broken:
        raise CheckpointError(
            f"{num_broken} of the {values.size} values of '{tensor.name}' are NaN or infinite: the training has diverged, or "
            "the file is broken; take an earlier checkpoint"
        )
    return values


def _decoded(tensor: StoredTensor, raw: np.ndarray) -> np.ndarray:
    if tensor.dtype not in NUMPY_TYPES:
        return dequantised(tensor, raw)
    stored_type = np.dtype(NUMPY_TYPES[tensor.dtype])
    if raw.size != stored_type.itemsize * math.prod(tensor.shape):
        raise _ends_early(tensor)
    stored = raw.view(stored_type)
    if tensor.dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.reshape(tensor.shape)


def _ends_early(tensor: StoredTensor) -> CheckpointError:
    return torn_file(tensor.file, f"it ends before the data of '{tensor.name}'")
