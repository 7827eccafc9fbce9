"""What may a forward of ours change in the model and in torch? Nothing that is not restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore the random state, the buffers and the training flags of a model after a forward of our own."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    training_flags = [(module, module.training) for module in model.modules()]
    # The devices of the model only: by default fork_rng takes every device, and warns where there are several.
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer  # a module may have assigned another tensor
                    # Copy only what changed: a copy raises the version counter, and a graph of the user's that saved
                    # the buffer would refuse its backward.
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for module, training in training_flags:
                module.training = training  # per module: train() would set all children alike
