"""Which tensors does a GGUF file contain, and what are their values? In the axis order of torch, dequantised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError, errors_of, printable
from depthscope.probes.checkpoints.gguf_header import GgufContents, check_gguf
from depthscope.probes.checkpoints.safetensors_header import StoredTensor

# ggml's types that numpy has, by their numbers, with the bytes of an element; bfloat16 is read as bits.
PLAIN = {0: ("F32", 4), 1: ("F16", 2), 28: ("F64", 8), 30: ("BF16", 2)}
ARCHITECTURE = "general.architecture"


def gguf_tensors(file: Path) -> tuple[list[StoredTensor], dict[str, Any]]:
    """The tensors of a GGUF file without their data, and its settings.

    Returns: Shapes in the order of torch: GGUF stores the last axis first.
    Returns: As a configuration has them: ``model_type`` is the architecture, whose prefix other keys lose.
    Raises CheckpointError: If the file is torn or of the other byte order.
    """
    contents = check_gguf(file)
    if contents.byte_order != "<":
        raise CheckpointError(
            f"'{file}' is a big-endian GGUF, whose values are not read here; convert it to little-endian"
        )
    tensors = [_stored(tensor, contents, file) for tensor in contents.tensors]
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise CheckpointError(f"'{file}' has a tensor's name twice; copy or download it again")
    for name in names:
        if not name.isprintable():  # names are printed, and an escape sequence would reach the terminal
            raise CheckpointError(
                f"'{file}' has the name {ascii(name)[:80]}, which is not a name of a tensor"
            )
    return tensors, _settings(contents)


def _stored(tensor: Any, contents: GgufContents, file: Path) -> StoredTensor:
    start = contents.data_start + tensor.offset
    count = math.prod(tensor.dimensions)
    if tensor.kind in PLAIN:
        dtype, size = PLAIN[tensor.kind]
        return StoredTensor(tensor.name, tensor.dimensions[::-1], dtype, file, start, start + size * count)
    name, block, size = quantised_type(tensor.kind)
    return StoredTensor(
        tensor.name, tensor.dimensions[::-1], name, file, start, start + size * (count // block)
    )


def quantised_type(kind: int) -> tuple[str, int, int]:
    """Name of a ggml type, the elements of its block and the bytes of that; no bytes where it is not known."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:  # without it the names and shapes are still known
        return f"GGML type {kind}", 1, 0
    if kind not in {each.value for each in GGMLQuantizationType}:
        return f"GGML type {kind}", 1, 0
    known = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES.get(known, (1, 0))
    return known.name, block, size


def dequantised(tensor: StoredTensor, raw: np.ndarray) -> np.ndarray:
    """Values of a quantised tensor.

    Raises CheckpointError: If the installed gguf package has no way to compute them.
    """
    advice = "take a GGUF whose connections are F32, F16, BF16 or of a type that the package gguf dequantises"
    with errors_of(
        "gguf", f"'{tensor.name}' is stored as {tensor.dtype}, which cannot be dequantised", advice
    ):
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[tensor.dtype]
        return np.asarray(dequantize(raw, kind)).reshape(tensor.shape)


def _settings(contents: GgufContents) -> dict[str, Any]:
    architecture = contents.texts.get(ARCHITECTURE, "")
    found: dict[str, Any] = {"model_type": printable(architecture)} if architecture else {}
    for key, value in (*contents.numbers.items(), *contents.texts.items()):
        if not key.startswith("general."):
            found[key.removeprefix(f"{architecture}.")] = value
    return found
