"""How are tensors read from weight files, and which weights are they? Safetensors, or a pickle that needs no code to open."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from os.path import exists
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from depthscope.probes.checkpoints.errors import CheckpointError, errors_of, first_line, printable
from depthscope.probes.checkpoints.own_files import own_file, read_json, require_file

INDEX_ENDING = ".safetensors.index.json"
# Keys under which training scripts save the weights next to the optimizer: Lightning's, then two common ones.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
NUM_LISTED = 5  # names in a message at most
LONGEST = 500  # characters of what torch says of weights that do not fit


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, from a .safetensors file, a sharded safetensors folder or a weights-only pickle.

    ``path``: A ``.safetensors`` file, its index, a folder with either, or a ``.pt``/``.pth``/``.bin`` file.
    Returns: On the CPU. Wrapper prefixes (``module.``, ``_orig_mod.``) are removed where every name has them.
    Raises CheckpointError: If the file is missing, torn, or a pickle that would have to run code.
    """
    if not exists(path):
        raise CheckpointError(f"no weights at '{path}'; give a .safetensors file or a .pt/.pth state dict")
    files = safetensors_files(path)
    if files:
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            with opened(file) as stored:
                names = stored.keys()
                loaded = {name: stored.get_tensor(name) for name in names}
            twice = tensors.keys() & loaded.keys()
            if twice:
                raise CheckpointError(
                    f"'{path}' has {len(twice)} tensors in several files ({min(twice)}); give the file that is meant"
                )
            tensors.update(loaded)
        return _without_wrapper_prefixes(tensors)
    if path.is_dir():
        raise CheckpointError(f"no .safetensors file in the folder '{path}'; give the weights file itself")
    return _without_wrapper_prefixes(_find_state_dict(load_pickle(path), path))


def safetensors_files(path: Path) -> list[Path]:
    """Every safetensors shard of a file, an index or a folder; empty if there is none."""
    index = find_index(path)
    if index is not None:
        return shards(index)
    if path.is_dir():
        return [own_file(path, file.name) for file in sorted(path.glob("*.safetensors"))]
    return [require_file(path)] if path.suffix == ".safetensors" else []


def shards(index: Path) -> list[Path]:
    """Every file that an index names, all of which must be there.

    Raises CheckpointError: If the index is none, a file is missing or is outside the index's folder.
    """
    names = sorted(set(read_index(index).values()))
    files = {name: own_file(index.parent, name) for name in names}
    missing = [name for name, file in files.items() if not exists(file)]
    if missing:
        raise CheckpointError(
            f"'{index}' names {len(files)} shards but {', '.join(missing[:NUM_LISTED])} is not there; complete the download"
        )
    return [require_file(file) for file in files.values()]


def find_index(path: Path) -> Path | None:
    """The index of a sharded checkpoint: in a folder, or the file itself if it is one."""
    if path.is_dir():
        name = min((file.name for file in path.glob("*" + INDEX_ENDING)), default=None)
        return None if name is None else own_file(path, name)
    return path if path.name.endswith(INDEX_ENDING) else None


def read_index(index: Path) -> dict[str, str]:
    """File name of every tensor that an index lists."""
    expected = "safetensors index" if index.name.endswith(INDEX_ENDING) else "list of weight files"
    entries = read_json(index, expected).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise CheckpointError(
            f"'{index}' is not a {expected}: its weight_map gives no file by tensor; download it again"
        )
    return entries


def opened(file: Path) -> Any:
    """A safetensors file, for `with`: its names, shapes and tensors.

    Raises CheckpointError: If it is torn or no safetensors file.
    """
    try:
        return safetensors.safe_open(require_file(file), framework="pt")
    except Exception as error:  # the library has an error of its own, which is no OSError and no ValueError
        raise CheckpointError(
            f"'{file}' is torn or not a safetensors file ({first_line(error)}); download or copy it again"
        ) from error


def load_pickle(file: Path) -> Any:
    """The contents of a ``.bin``, ``.pt`` or ``.pth`` file: tensors and plain values, no code.

    Raises CheckpointError: If it is no regular file, torn, or would have to run code.
    """
    require_file(file)
    with errors_of("torch", f"'{file}' cannot be read as torch weights"), warnings.catch_warnings():
        # That it was written by another program is no reason to refuse it.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            # Mapped where the format allows it: a file may be larger than the memory.
            mapped = zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"'{file}' is a pickle that contains more than tensors and would have to run code to open, or it is torn; "
                "save the weights alone with torch.save(model.state_dict(), path), or ask for a .safetensors version"
            ) from error


def _find_state_dict(content: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"'{path}' contains a {type(content).__name__}; expected a state dict of tensors"
        )
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        if not all(isinstance(name, str) for name in content):
            raise CheckpointError(f"'{path}' has tensors without names; save model.state_dict()")
        return dict(content)
    for key in STATE_DICT_KEYS:
        if isinstance(content.get(key), Mapping):
            return _find_state_dict(content[key], path)
    found = ", ".join(ascii(key)[:80] for key in list(content)[:6]) or "nothing"
    raise CheckpointError(f"'{path}' contains no state dict (found: {found}); save model.state_dict()")


def _without_wrapper_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            cut = {name.removeprefix(prefix): value for name, value in tensors.items()}
            return _without_wrapper_prefixes(cut)  # wrappers nest: a compiled model inside data parallelism
    return tensors


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Load every tensor into the model; a name or shape that does not fit is an error, not a warning.

    ``tensors``: its state dict. Of tied parameters one name is enough.
    ``source``: where the tensors came from, for the message.
    """
    # keep_vars gives the parameters themselves, so that tied ones show by their identity.
    expected = model.state_dict(keep_vars=True)
    by_parameter = {id(expected[name]): value for name, value in tensors.items() if name in expected}
    tied = {name: by_parameter[id(value)] for name, value in expected.items() if id(value) in by_parameter}
    try:
        model.load_state_dict({**tied, **tensors})
    except Exception as error:  # torch lists in lines what is missing, unexpected and of another shape
        raise CheckpointError(
            f"the weights '{source}' do not fit {type(model).__name__}: {printable(' '.join(str(error).split()), LONGEST)}; "
            "give the weights of this very architecture"
        ) from error


# --- which weights these are

CHUNK = 1 << 20  # bytes
FULL_DIGEST_LIMIT = 4 << 30  # bytes; hashing more takes longer than the capture itself (a heuristic of ours)


def file_digest(files: Iterable[Path]) -> str:
    """Digest of a checkpoint's weight files, the same on every machine.

    One file gives its plain SHA-256, as ``sha256sum`` prints it; several give the SHA-256 of their
    ``digest  name`` lines. Beyond 4 GiB in total only the size, the first and the last MiB of each file are
    hashed, and the prefix ``sha256-sampled`` marks it.
    """
    paths = sorted(require_file(file) for file in files)
    sampled = sum(path.stat().st_size for path in paths) > FULL_DIGEST_LIMIT
    hashes = [_file_hash(path, sampled=sampled) for path in paths]
    lines = "".join(f"{value}  {path.name}\n" for value, path in zip(hashes, paths, strict=True))
    value = hashes[0] if len(paths) == 1 else hashlib.sha256(lines.encode()).hexdigest()
    return f"sha256-sampled:{value}" if sampled else f"sha256:{value}"


def _file_hash(path: Path, *, sampled: bool) -> str:
    with path.open("rb") as file:
        if not sampled:
            return hashlib.file_digest(file, "sha256").hexdigest()
        # The first MiB has the header with all names and shapes, the last one weights that training changes.
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode() + file.read(CHUNK))
        file.seek(max(0, size - CHUNK))
        digest.update(file.read(CHUNK))
        return digest.hexdigest()


def parameter_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since numpy has no bfloat16; flattened first, since a scalar cannot be viewed as another type.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
