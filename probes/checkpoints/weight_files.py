"""What do the weight files hold? Tensors only: safetensors, or a pickle that needs no code to open."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

CHUNK = 1 << 20
FULL_DIGEST_LIMIT = 4 << 30  # a complete hash of more would take longer than the capture itself
NESTED_NAMES = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what came, what was expected, what to do."""


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, from a .safetensors file, a sharded safetensors folder or a weights-only pickle.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, its index, a folder with either, or a ``.pt``/``.pth``/``.bin`` file.

    Returns
    -------
    dict of str to torch.Tensor
        On the CPU. Wrapper prefixes that every name carries (``module.``, ``_orig_mod.``) are cut.

    Raises
    ------
    CheckpointError
        If the file is absent, torn, or a pickle that would have to run code.
    """
    if not path.exists():
        raise CheckpointError(f"no weights at '{path}'; give a .safetensors file or a .pt/.pth state dict")
    files = safetensors_files(path)
    if files:
        check_safetensors(files)
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors.update(load_file(file))
        return _without_wrappers(tensors)
    if path.is_dir():
        raise CheckpointError(f"no .safetensors file in the folder '{path}'; give the weights file itself")
    return _without_wrappers(_unpickled(path))


def safetensors_files(path: Path) -> list[Path]:
    """Every safetensors shard that a file, an index or a folder stands for; empty if there is none."""
    if path.is_dir():
        index = sorted(path.glob("*.safetensors.index.json"))
        return safetensors_files(index[0]) if index else sorted(path.glob("*.safetensors"))
    if path.name.endswith(".safetensors.index.json"):
        return _indexed_shards(path)
    return [path] if path.suffix == ".safetensors" else []


def _indexed_shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is no safetensors index ({error}); download it again") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"'{index}' names {len(names)} shards but {', '.join(absent)} is not there; complete the download"
        )
    return [index.parent / name for name in names]


def check_safetensors(files: Iterable[Path]) -> None:
    """Refuse torn files before anything is built on them.

    Raises
    ------
    CheckpointError
        If a header cannot be read or a file is shorter than its header says.
    """
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except safetensors.SafetensorError as error:
            raise CheckpointError(
                f"'{file}' is torn or no safetensors file ({error}); copy or download it again"
            ) from error


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' is a pickle that holds more than tensors and would have to run code to open; save the "
            "weights alone with torch.save(model.state_dict(), path) or as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"'{path}' cannot be read as torch weights ({error}); copy it again") from error
    return _tensors_of(content, path)


def _tensors_of(content: object, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items()}
        nested = [name for name in NESTED_NAMES if isinstance(content.get(name), Mapping)]
        if nested:
            return _tensors_of(content[nested[0]], path)
        found = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise CheckpointError(f"'{path}' holds no state dict (found: {found}); save model.state_dict()")
    raise CheckpointError(f"'{path}' holds a {type(content).__name__}; expected a state dict of tensors")


def _without_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_wrappers({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Put every tensor in its place; a name or shape that does not fit is an error, not a warning.

    Parameters
    ----------
    model : nn.Module
        The model to fill, in place.
    tensors : Mapping of str to torch.Tensor
        Its state dict. Of tied parameters one name is enough.
    source : str
        Where the tensors came from, for the message.

    Raises
    ------
    CheckpointError
        Listing missing, unexpected and mis-shaped entries.
    """
    expected = model.state_dict(keep_vars=True)
    tied = {id(expected[name]) for name in tensors if name in expected}
    missing = [name for name, value in expected.items() if name not in tensors and id(value) not in tied]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in tensors.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        kind = type(model).__name__
        raise CheckpointError(
            f"the weights '{source}' do not fit {kind}: "
            + "; ".join(
                f"{len(names)} {word} ({_listed(names)})"
                for word, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
                if names
            )
            + "; give the weights of this very architecture"
        )
    model.load_state_dict(tensors, strict=False)  # the check above is the strict one: it knows tied names


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def file_digest(files: Iterable[Path]) -> str:
    """Digest of a checkpoint's weight files, the same on every machine.

    One file gives its plain SHA-256, as ``sha256sum`` prints it; several give the SHA-256 of their
    ``digest  name`` lines. Beyond 4 GiB in total only the size, the first and the last MiB of each file are
    hashed, and the digest says so.

    Parameters
    ----------
    files : iterable of Path
        The weight files.

    Returns
    -------
    str
        ``sha256:…`` or ``sha256-sampled:…``.
    """
    paths = sorted(files)
    sampled = sum(path.stat().st_size for path in paths) > FULL_DIGEST_LIMIT
    hashes = [_file_hash(path, sampled=sampled) for path in paths]
    lines = "".join(f"{value}  {path.name}\n" for value, path in zip(hashes, paths, strict=True))
    value = hashes[0] if len(paths) == 1 else hashlib.sha256(lines.encode()).hexdigest()
    return f"sha256-sampled:{value}" if sampled else f"sha256:{value}"


def _file_hash(path: Path, *, sampled: bool) -> str:
    with path.open("rb") as file:
        if not sampled:
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode() + file.read(CHUNK))
        file.seek(max(0, size - CHUNK))
        digest.update(file.read(CHUNK))
        return digest.hexdigest()


def parameter_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of a model's state, for models that come from no file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
