"""Were two runs measured with the same weights? A digest of some numbers of each parameter says so, without reading all."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

TAKEN = 256  # numbers of each parameter: any optimiser moves nearly all
SHARDED = "FullyShardedDataParallel"  # its parameters look like any other, and are parts


def weights_digest(model: nn.Module) -> str | None:
    """A digest of the names, shapes, kinds and some numbers of all parameters, the same in every process.

    Parameters
    ----------
    model : Module
        The model.

    Returns
    -------
    str or None
        SHA-256; None where a parameter cannot be read here as a whole: sharded, offloaded, not initialised.
    """
    parameters = dict(model.named_parameters())
    if any(type(module).__name__ == SHARDED for module in model.modules()):
        return None
    if not all(_is_whole(parameter) for parameter in parameters.values()):
        return None
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_some(parameter).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_whole(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
        return False
    return parameter.layout == torch.strided and not (
        hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")  # DTensor; DeepSpeed's third stage
    )


def _some(parameter: nn.Parameter) -> torch.Tensor:
    """Numbers at even distances, the first among them."""
    flat = parameter.detach().reshape(-1)
    step = max(len(flat) // TAKEN, 1) | 1  # odd, so that not one column of a matrix is all that is seen
    return flat[::step].cpu().contiguous()
