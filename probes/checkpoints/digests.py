"""Which weights are these? Digests of weight files, and of models that come from no file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from depthscope.probes.checkpoints.own_files import require_file

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
