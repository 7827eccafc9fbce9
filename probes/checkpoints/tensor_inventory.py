"""Which tensors are in a checkpoint? Names, shapes and types from its headers; values only of those requested."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError, errors_of, printable
from depthscope.probes.checkpoints.own_files import list_folder, own_file, require_file
from depthscope.probes.checkpoints.weight_files import INDEX_ENDING, opened, safetensors_files

FLOATS = ("F64", "F32", "F16", "BF16")
SHARD_OF_SERIES = re.compile(r"-\d+-of-(\d+)$")
GGUF = ".gguf"
EXPECTED = "expected a folder with .safetensors files (and their index, if there are several), one such file, or a .gguf file"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file, without its data: shape in the order of torch, type by the name that the format has."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a checkpoint, and its files."""

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    settings: dict[str, Any] | None = None
    """The configuration, where the files themselves contain it, as GGUF does."""


def take_inventory(path: Path) -> Inventory:
    """List every tensor of a safetensors or GGUF checkpoint, without its data.

    ``path``: A folder, one ``.safetensors`` or ``.gguf`` file or an index.
    Raises CheckpointError: If there is no such file, a header is torn, the index is none, or a shard is missing.
    """
    if not exists(path):
        raise CheckpointError(f"no checkpoint at '{path}'; {EXPECTED}")
    if not path.is_dir():
        require_file(path)
    files = safetensors_files(path)
    if not files:
        return _gguf_inventory(path)
    _require_complete_series(files)
    return Inventory(headers(files), tuple(files))


def _gguf_inventory(path: Path) -> Inventory:
    files = _gguf_files(path)
    if not files:
        raise CheckpointError(_advice_without_safetensors(path))
    _require_complete_series(files)
    tensors: dict[str, StoredTensor] = {}
    settings: dict[str, Any] = {}
    for file in files:
        reader = gguf_reader(file)
        for found in reader.tensors:
            shape = tuple(int(size) for size in found.shape[::-1])  # GGUF stores the last axis first
            tensors[found.name] = StoredTensor(found.name, shape, found.tensor_type.name, file)
        # The first has the model's, the others of a series their number
        settings = _settings(reader) | settings
    return Inventory(tensors, tuple(files), settings)


def gguf_reader(file: Path) -> Any:
    """The header of a GGUF file, mapped: values are read when they are asked for.

    Raises CheckpointError: If the package gguf is missing, or the file is torn or of another kind.
    """
    advice = "download or copy it again"
    with errors_of("gguf", f"'{require_file(file)}' cannot be read as GGUF", advice):
        from gguf import GGUFReader

        return GGUFReader(file)


def _settings(reader: Any) -> dict[str, Any]:
    """The metadata as a configuration has them: ``model_type`` is the architecture, whose prefix other keys lose."""
    # Lists, such as a vocabulary, are no settings, and cost minutes to read.
    values = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
    architecture = str(values.get("general.architecture", ""))
    found: dict[str, Any] = {"model_type": printable(architecture)} if architecture else {}
    for key, value in values.items():
        if not key.startswith(("general.", "GGUF.")):
            found[key.removeprefix(f"{architecture}.")] = value
    return found


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
    names = [file.name for file in list_folder(path)] if path.is_dir() else [path.name]
    found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return (
        f"'{path}' contains no safetensors or GGUF (found: {found or 'nothing'}); {EXPECTED}. Tensors of a pickle cannot be "
        "read one by one: load the model and save it with save_pretrained(folder), or its state dict with safetensors"
    )


def _require_complete_series(files: list[Path]) -> None:
    """Refuse shards named ``…-00001-of-00003`` of which some are missing: without an index their tensors are unknown."""
    numbered = [found for file in files if (found := SHARD_OF_SERIES.search(file.stem))]
    expected = max((int(found.group(1)) for found in numbered), default=0)
    if len(numbered) < expected:
        raise CheckpointError(
            f"'{files[0].parent}' contains {len(numbered)} of {expected} shards and no index ({INDEX_ENDING[1:]}), so what "
            "is missing is not known; complete the download"
        )


def headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by their names; refused where a file is torn."""
    found = {}
    for file in files:
        with opened(file) as stored:
            names = stored.keys()
            for name in names:
                part = stored.get_slice(name)
                found[name] = StoredTensor(name, tuple(part.get_shape()), part.get_dtype(), file)
    return found


def read_values(tensors: Iterable[StoredTensor]) -> dict[str, np.ndarray]:
    """Read the values of some tensors as float64; no other tensor of their files is read.

    Raises CheckpointError: If a file is torn, a type is not floating point, or a value is not finite.
    """
    return {tensor.name: _finite_values(tensor) for tensor in tensors}


def _finite_values(tensor: StoredTensor) -> np.ndarray:
    if math.prod(tensor.shape) == 0:
        raise CheckpointError(
            f"'{tensor.name}' has no values (its shape is {tensor.shape}); download the checkpoint again"
        )
    values = (_of_gguf if tensor.file.suffix == GGUF else _of_safetensors)(tensor)
    num_broken = int(np.sum(~np.isfinite(values)))
    if num_broken:
        raise CheckpointError(
            f"{num_broken} of the {values.size} values of '{tensor.name}' are NaN or infinite: the training has diverged, or "
            "the file is broken; take an earlier checkpoint"
        )
    return values


def _of_safetensors(tensor: StoredTensor) -> np.ndarray:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"'{tensor.name}' is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}: take a checkpoint whose "
            "connections are not quantised"
        )
    with opened(tensor.file) as stored:
        return np.asarray(stored.get_tensor(tensor.name).double().numpy())


def _of_gguf(tensor: StoredTensor) -> np.ndarray:
    advice = "take a GGUF whose connections are F32, F16, BF16 or of a type that the package gguf dequantises"
    with errors_of(
        "gguf", f"'{tensor.name}' is stored as {tensor.dtype}, which cannot be dequantised", advice
    ):
        from gguf.quants import dequantize

        found = next(each for each in gguf_reader(tensor.file).tensors if each.name == tensor.name)
        values = dequantize(found.data, found.tensor_type)
        return np.asarray(values, np.float64).reshape(tensor.shape)
