"""Were two runs measured with the same weights? A digest of some numbers of each parameter answers, without reading all."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from depthscope.probes.model.modules import all_modules

# Numbers of each parameter. An optimizer's step changes nearly all of them, so that a few do; `checkpoints.digests` reads
# all, which takes seconds for a large model.
NUMBERS_PER_PARAMETER = 256
NUMPY_TYPES = (torch.float32, torch.float64, torch.float16)
SHARDED = "FullyShardedDataParallel"  # its parameters are shards, but look like plain ones


def weights_digest(model: nn.Module) -> str | None:
    """SHA-256 over the names, shapes, types and some numbers of all parameters, the same in every process.

    None where a parameter cannot be read in this process: sharded, offloaded, not initialised.
    """
    if any(type(module).__name__ == SHARDED for module in all_modules(model)):
        return None
    parameters = dict(model.named_parameters())
    if not all(_is_readable(parameter) for parameter in parameters.values()):
        return None
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_some_numbers(parameter))
    return digest.hexdigest()


def _is_readable(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
        return False
    # By attributes, without importing either: a DTensor; a parameter of DeepSpeed's third stage, which is empty here.
    is_shard = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")
    # Quantised weights have a class of their own that computes what torch does not know of them.
    is_plain = type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return parameter.layout == torch.strided and is_plain and not is_shard


def _some_numbers(parameter: nn.Parameter) -> bytes:
    """Numbers at equal distances, from the first one on."""
    # Odd: an even one may divide the width, and read one column
    step = max(parameter.numel() // NUMBERS_PER_PARAMETER, 1) | 1
    flat = parameter.detach().reshape(-1)
    if flat.dtype in NUMPY_TYPES and flat.device.type == "cpu":
        return flat.numpy()[::step].tobytes()  # thousands of parameters: numpy takes a third of the time
    return flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()
