"""How are tensors read from weight files? From safetensors, or from a pickle that needs no code to open."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

INDEX_ENDING = ".safetensors.index.json"
# Keys under which training scripts save the weights next to the optimiser: Lightning's, then two common ones.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
NUM_LISTED = 5  # names in a message at most


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message states what came, what was expected and what to do."""


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, from a .safetensors file, a sharded safetensors folder or a weights-only pickle.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, its index, a folder with either, or a ``.pt``/``.pth``/``.bin`` file.

    Returns
    -------
    dict of str to torch.Tensor
        On the CPU. Wrapper prefixes (``module.``, ``_orig_mod.``) are removed where every name has them.

    Raises
    ------
    CheckpointError
        If the file is missing, torn, or a pickle that would have to run code.
    """
    if not path.exists():
        raise CheckpointError(f"no weights at '{path}'; give a .safetensors file or a .pt/.pth state dict")
    files = safetensors_files(path)
    if files:
        check_safetensors(files)
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors.update(load_file(file))
        return _without_wrapper_prefixes(tensors)
    if path.is_dir():
        raise CheckpointError(f"no .safetensors file in the folder '{path}'; give the weights file itself")
    return _without_wrapper_prefixes(_unpickled(path))


def safetensors_files(path: Path) -> list[Path]:
    """Every safetensors shard of a file, an index or a folder; empty if there is none."""
    index = find_index(path)
    if index is not None:
        names = sorted(set(read_index(index).values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
        if missing:
            raise CheckpointError(
                f"'{index}' names {len(names)} shards but {', '.join(missing)} is not there; complete the download"
            )
        return [index.parent / name for name in names]
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    return [path] if path.suffix == ".safetensors" else []


def find_index(path: Path) -> Path | None:
    """The index of a sharded checkpoint: in a folder, or the file itself if it is one."""
    if path.is_dir():
        return min(path.glob("*" + INDEX_ENDING), default=None)
    return path if path.name.endswith(INDEX_ENDING) else None


def read_index(index: Path) -> dict[str, str]:
    """File name of every tensor that an index lists."""
    try:
        entries = json.loads(index.read_text())["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is no safetensors index ({error}); download it again") from error
    return {str(name): str(file) for name, file in entries}


def check_safetensors(files: Iterable[Path]) -> None:
    """Refuse torn files before anything is built on them.

    Raises
    ------
    CheckpointError
        If a header cannot be read or a file is shorter than its header states.
    """
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass  # opening compares the header with the file's size
        except safetensors.SafetensorError as error:
            raise torn_file(file, str(error)) from error


def torn_file(file: Path, reason: str) -> CheckpointError:
    """The error for a damaged safetensors file."""
    return CheckpointError(f"'{file}' is torn or no safetensors file ({reason}); copy or download it again")


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' is a pickle that contains more than tensors and would have to run code to open; save the "
            "weights alone with torch.save(model.state_dict(), path) or as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"'{path}' cannot be read as torch weights ({error}); copy it again") from error
    return _find_state_dict(content, path)


def _find_state_dict(content: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"'{path}' contains a {type(content).__name__}; expected a state dict of tensors"
        )
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return {str(name): value for name, value in content.items()}
    for key in STATE_DICT_KEYS:
        if isinstance(content.get(key), Mapping):
            return _find_state_dict(content[key], path)
    found = ", ".join(map(str, list(content)[:6])) or "nothing"
    raise CheckpointError(f"'{path}' contains no state dict (found: {found}); save model.state_dict()")


def _without_wrapper_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            cut = {name.removeprefix(prefix): value for name, value in tensors.items()}
            return _without_wrapper_prefixes(cut)  # wrappers nest: a compiled model inside data parallelism
    return tensors


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Load every tensor into the model; a name or shape that does not fit is an error, not a warning.

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
    # keep_vars gives the parameters themselves, so that tied ones show by their identity.
    expected = model.state_dict(keep_vars=True)
    tied = {id(expected[name]) for name in tensors if name in expected}
    problems = {
        "missing": [
            name for name, value in expected.items() if name not in tensors and id(value) not in tied
        ],
        "unexpected": [name for name in tensors if name not in expected],
        "mis-shaped": [
            f"{name} {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
            for name, value in tensors.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    listed = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:NUM_LISTED])}{', …' if len(names) > NUM_LISTED else ''})"
        for kind, names in problems.items()
        if names
    )
    if listed:
        raise CheckpointError(
            f"the weights '{source}' do not fit {type(model).__name__}: {listed}; give the weights of this very architecture"
        )
    model.load_state_dict(tensors, strict=False)  # the check above is stricter, but for tied names
