"""What may a forward of ours change in the model and in the random states? Nothing that is not restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from depthscope.probes.model.modules import all_modules, own_parameters

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore the random states, the buffers and the training flags of a model after a forward of our own.

    Of a module whose buffers it wrote, also the attributes: a cache of positions whose buffer is put back, and whose length
    stays, would be read as if it were filled.
    """
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
    noted, given = {module: _Attributes(module) for module, *_ in buffers}, dict[int, int]()
    with torch.random.fork_rng(devices=devices):
        try:
            # The forward gets copies to write into: a write raises a buffer's version counter, even one that puts the
            # old values back, and a graph of the user's that saved the buffer would refuse its backward.
            copies: dict[int, torch.Tensor] = {}  # by identity: modules that share a buffer go on sharing it
            for module, name, buffer in buffers:
                if not buffer.is_meta:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            given |= {number: _version(copy) for number, copy in copies.items()}
            yield
        finally:
            for module, name, buffer in buffers:
                now, copy = module._buffers.get(name), copies.get(id(buffer))
                if copy is not None and (now is not copy or _version(copy) != given.get(id(buffer))):
                    noted[module].restore()
                module._buffers[name] = buffer
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, training in training_flags:
                if module.training != training:
                    module.training = training  # per module: train() would set all children alike


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Restore what a forward of our own notes in the attributes of modules: counters, caches, the lists and dicts in them."""
    before = [_Attributes(module) for module in all_modules(model)]
    try:
        yield
    finally:
        for of in before:
            of.restore()


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written; −1 where PyTorch does not count it."""
    return -1 if tensor.is_inference() else tensor._version


class _Attributes:
    """The attributes of a module, and what is in the lists, dicts and sets among them."""

    def __init__(self, module: nn.Module):
        self._module, self._values = module, dict(vars(module))
        self._contents = [
            (value, value.copy())
            for name, value in vars(module).items()
            # Not those of `nn.Module` itself: hooks come and go, and `preserved_state` restores the buffers.
            if type(value) in (list, dict, set) and name not in MODULE_ATTRIBUTES
        ]

    def restore(self) -> None:
        """Put them back."""
        entries = vars(self._module)
        for name in entries.keys() - self._values.keys():
            del entries[name]
        entries.update(self._values)
        for container, content in self._contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
