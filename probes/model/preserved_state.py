"""What may a forward of ours change in the model and in the random states? Nothing that is not restored afterwards."""

from __future__ import annotations

import copy
import operator
import os
import random
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.probes.model.hooks import WatchedMethod
from depthscope.probes.model.modules import all_parameters, module_paths
from depthscope.probes.model.tensors import version

# Where it is loaded, torch's compiler may be in use: its import takes a second, which `torch.compile` does and we must not.
COMPILER = "torch._dynamo"


class _AsWritten:
    """Compiled models run uncompiled inside of it, in all threads, as the stance of torch's compiler is that of all.

    Code that `torch.compile` made skips hooks that were put on since.
    """

    def __init__(self) -> None:
        self._users = 0
        self._renew_lock()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()  # a thread that the child does not have may hold the old one

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._ours: Any = torch.compiler.set_stance("force_eager")
            self._users += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._users -= 1
            # The user may have taken another one meanwhile.
            if self._users == 0 and torch._dynamo.eval_frame._stance is self._ours.stance:
                self._ours.__exit__(None, None, None)


_as_written = _AsWritten()

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
MAPPINGS = (dict, OrderedDict, defaultdict)
CHANGED = (*MAPPINGS, list, deque)
CONTAINERS = (*CHANGED, set, tuple)
UNCHANGED = frozenset((type(None), bool, int, float, str))  # values that no code can write into
COPIED = (np.ndarray, np.random.Generator, random.Random, torch.Generator)
# What these note is about the processes and the compiled code, not about the model; a part of it lies in other objects.
WRAPPERS = ("torch.distributed.", "torch.nn.parallel.", "torch._dynamo.")


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Run a model for ourselves, as it is written: random states, buffers, plain attributes and training flags come back."""
    modules = [module for _, module in module_paths(model)]
    # Frozen TorchScript has no such flag.
    training_flags = [(module, module.training) for module in modules if hasattr(module, "training")]
    # The devices of the model only: by default fork_rng takes every device, and warns where there are several.
    devices = sorted({p.device.index or 0 for p in all_parameters(model) if p.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (a model may draw from it)
    contents = _Contents(modules)
    with torch.random.fork_rng(devices=devices), _as_written if COMPILER in sys.modules else nullcontext():
        try:
            contents.give_copies()
            yield
        finally:
            contents.restore()
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, training in training_flags:
                if module.training != training:
                    module.training = training  # per module: train() would set all children alike


class _Contents:
    """The buffers and plain attributes of modules, with what is in the lists, dicts, sets and tuples among them.

    The forward gets copies to write into: a write raises a tensor's version counter, even one that puts the old values back,
    and a graph of the user's that saved the tensor would refuse its backward. Only what has a graph itself, or lies in a
    tuple, cannot be exchanged: it is written back if it was written.
    """

    def __init__(self, modules: list[nn.Module]):
        self._before: list[tuple[Any, Any]] = []
        self._exchanged: dict[int, Any] = {}
        self._written_back: list[tuple[torch.Tensor, int | None, torch.Tensor]] = []
        seen: set[int] = set()
        for module in modules:
            buffers = dict(module._buffers.items())
            if buffers:
                self._before.append((module._buffers, buffers))
                self._exchanged |= {id(buffer): buffer for buffer in buffers.values() if buffer is not None}
            if not type(module).__module__.startswith(WRAPPERS):
                self._note(vars(module), seen)

    def _note(self, container: Any, seen: set[int]) -> None:
        seen.add(id(container))
        content = _content(container)
        self._before.append((container, content))
        for name, value in _entries(content):
            if type(value) in UNCHANGED or name in MODULE_ATTRIBUTES:  # hooks come and go
                continue
            if type(value) in CONTAINERS:
                if id(value) not in seen:
                    self._note(value, seen)
            elif isinstance(container, CHANGED) and (
                isinstance(value, COPIED) or (type(value) is torch.Tensor and not value.requires_grad)
            ):
                self._exchanged[id(value)] = value
            elif type(value) is torch.Tensor and not value.is_meta:
                self._written_back.append((value, version(value), value.detach().clone()))

    def give_copies(self) -> None:
        """Put copies in place of what a forward may write into; what shares memory goes on sharing it."""
        users = Counter(_storage(value) for value in self._exchanged.values())
        shared = {
            storage: value.untyped_storage().clone()
            for value in self._exchanged.values()
            if (storage := _storage(value)) is not None and users[storage] > 1
        }
        copies = {number: _copy(value, shared) for number, value in self._exchanged.items()}
        for container, content in self._before:
            if not isinstance(container, set | tuple):
                for name, value in _entries(content):
                    if id(value) in copies:
                        container[name] = copies[id(value)]

    def restore(self) -> None:
        """Put everything back that is no longer the same."""
        for container, content in self._before:
            _put_back(container, content)
        for tensor, before, values in self._written_back:
            if before is None or version(tensor) != before:
                tensor.data.copy_(values)


def _content(container: Any) -> Any:
    if isinstance(container, set):
        return set(container)
    return list(container) if isinstance(container, list | deque | tuple) else dict(container.items())


def _entries(content: Any) -> Iterable[tuple[Any, Any]]:
    return content.items() if isinstance(content, dict) else enumerate(content)


def _put_back(container: Any, content: Any) -> None:
    if isinstance(content, dict):
        now = dict(container.items())
        # A method that a probe observes comes and goes like a hook, in its own time.
        watched = {n for each in (now, content) for n, of in each.items() if isinstance(of, WatchedMethod)}
        for name in now.keys() - content.keys() - watched:
            del container[name]
        for name, value in content.items():
            if name not in watched and (name not in now or now[name] is not value):
                container[name] = value
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif not isinstance(container, tuple) and not _are_same(container, content):
        container.clear()
        container.extend(content)


def _are_same(first: list[Any] | deque[Any], other: list[Any]) -> bool:
    return len(first) == len(other) and all(map(operator.is_, first, other))


def _copy(value: Any, shared: Mapping[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if value.is_meta:
        return value
    number = _storage(value)
    if number is None or number not in shared:
        return value.detach().clone()
    storage = shared[number]
    return value.detach().new_empty(0).set_(storage, value.storage_offset(), value.size(), value.stride())


def _storage(value: Any) -> int | None:
    """Which memory a plain tensor lies in; None of anything else."""
    plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.is_meta
    return value.untyped_storage()._cdata if plain else None
