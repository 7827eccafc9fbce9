"""What may a forward of ours change in the model and in the random states? Nothing that is not restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.probes.model.modules import all_modules, own_parameters

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore the random states, the buffers and the training flags of a model after a forward of our own."""
    modules = all_modules(model)
    buffers = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # Frozen TorchScript has no such flag.
    training_flags = [(module, module.training) for module in modules if hasattr(module, "training")]
    # The devices of the model only: by default fork_rng takes every device, and warns where there are several.
    devices = sorted({p.device.index or 0 for p in own_parameters(modules) if p.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (a model may draw from it)
    with torch.random.fork_rng(devices=devices):
        try:
            # The forward gets copies to write into: a write raises a buffer's version counter, even one that puts the
            # old values back, and a graph of the user's that saved the buffer would refuse its backward.
            copies: dict[int, torch.Tensor] = {}  # by identity: modules that share a buffer go on sharing it
            for module, name, buffer in buffers:
                if not buffer.is_meta:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            yield
        finally:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, training in training_flags:
                if module.training != training:
                    module.training = training  # per module: train() would set all children alike


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Restore what a forward of our own notes in the attributes of modules: counters, caches, the lists and dicts in them."""
    before = [(module, dict(vars(module)), _contents(module)) for module in all_modules(model)]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            entries = vars(module)
            for name in entries.keys() - attributes.keys():
                del entries[name]
            entries.update(attributes)
            for container, content in contents:
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The lists, dicts and sets among a module's own attributes, each with a copy."""
    return [
        (value, value.copy())
        for name, value in vars(module).items()
        # Not those of `nn.Module` itself: hooks come and go, and `preserved_state` restores the buffers.
        if type(value) in (list, dict, set) and name not in MODULE_ATTRIBUTES
    ]
