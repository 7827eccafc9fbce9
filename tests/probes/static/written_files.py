"""Writes tensors as a checkpoint: safetensors with a config.json, in shards with an index, or GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def write_safetensors(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """One file in a folder."""
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(
    folder: Path, tensors: Tensors, config: dict[str, Any], settings: dict[str, float], *, quantised: str = ""
) -> Path:
    """One GGUF file; its metadata have the numbers of the configuration. Tensors that ``quantised`` names are Q8_0."""
    import gguf

    config = {**config, **config.get("text_config", {})}
    architecture = str(config.get("model_type", ""))
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), architecture or "none")
    for key, value in (config | settings).items():
        name = f"{architecture or 'none'}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
    for name, tensor in tensors.items():
        values = np.atleast_1d(tensor.float().numpy())
        if quantised and quantised in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"
