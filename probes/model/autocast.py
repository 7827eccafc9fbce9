"""Which autocast does code of ours run under inside a hook? None for measurements; the user's own to rerun a module."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")


class _UserAutocast(threading.local):
    """The autocast types of the user's code by device; per thread, as torch's own autocast state is."""

    types: Mapping[str, torch.dtype] = MappingProxyType({})


_user_autocast = _UserAutocast()


@contextmanager
def no_grad_no_autocast() -> Iterator[None]:
    """Compute without a graph and without the user's autocast, for measurements inside a hook."""
    # No graph: non-reentrant activation checkpointing counts the tensors saved for backward and raises when the
    # recomputation saves another number than the forward did. No autocast: our products would be rounded to bfloat16.
    active = {
        device: torch.get_autocast_dtype(device)
        for device in AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    }
    previous, _user_autocast.types = _user_autocast.types, active
    try:
        # The flag alone: the type and the cache of cast weights stay those of the user's forward.
        for device in active:
            torch.set_autocast_enabled(device, False)
        with torch.no_grad():
            yield
    finally:
        for device in active:
            torch.set_autocast_enabled(device, True)
        _user_autocast.types = previous


@contextmanager
def user_autocast() -> Iterator[None]:
    """Compute under the autocast of the user's code around the running hook, to run a module of the model again."""
    active = dict(_user_autocast.types)
    try:
        for device in active:
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device in active:
            torch.set_autocast_enabled(device, False)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which the user's code around the running hook multiplies a tensor: autocast's, or the tensor's own."""
    return _user_autocast.types.get(tensor.device.type, tensor.dtype)
