"""May a forward of ours run among several processes, of which no other one knows? Where it exchanges nothing with them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.errors import CaptureError

OF_EXCHANGES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem")
"""Namespaces of the operations by which torch's processes exchange tensors."""


def _are_several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def require_no_exchange(module: nn.Module) -> None:
    """Require that a model has no wrapper or weights that exchange something in each of its forwards.

    Raises CaptureError: Where its weights are spread over processes, or DistributedDataParallel is inside of it.
    """
    if _are_several() and _is_sharded(module):
        raise CaptureError(
            "a compiled model is measured by one more forward, which would gather its sharded weights once more and could "
            "wait for the other processes for ever; record it uncompiled"
        )
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
        raise CaptureError(
            "a compiled model is measured by one more forward, which DistributedDataParallel would count as the user's; "
            "record the module inside of it, or compile that: DistributedDataParallel(torch.compile(model)) can be recorded"
        )


def _is_sharded(module: nn.Module) -> bool:
    wrapped = any(
        hasattr(part, "_get_fsdp_state") or type(part).__name__ == "FullyShardedDataParallel"
        for part in module.modules()
    )
    return wrapped or any(hasattr(parameter, "device_mesh") for parameter in module.parameters())


class _NoExchange(TorchDispatchMode):
    """Raises where something is about to be exchanged with other processes, before it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in OF_EXCHANGES:
            raise CaptureError(
                f"a compiled model is measured by one more forward, in which it would exchange something with other processes "
                f"({func.name()}) and could wait for them for ever; record it uncompiled"
            )
        return func(*args, **(kwargs or {}))


def without_exchange() -> AbstractContextManager[Any]:
    """What forwards and backwards of ours run in among several processes: an exchange raises `CaptureError`."""
    return _NoExchange() if _are_several() else nullcontext()
