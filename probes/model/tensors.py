"""Which tensors does a call take or return? Those inside nested containers; their versions, and local data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.errors import CaptureError


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors in nested tuples, lists, dicts, dataclasses, graphs and model outputs, in order."""
    found: list[torch.Tensor] = []
    _add_tensors((value,), found)
    return found


def _add_tensors(values: Iterable[Any], found: list[torch.Tensor]) -> None:
    # A list and no generator, since hooks on every module call it.
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):  # transformers' ModelOutput too: it is an OrderedDict
            _add_tensors(value.values(), found)
        elif isinstance(value, (tuple, list)):
            _add_tensors(value, found)
        elif _is_record(value):
            _add_tensors(vars(value).values(), found)


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A batch with every tensor of it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    return type(value)(mapped(item, change) for item in value) if type(value) in (tuple, list) else value


def _is_record(value: Any) -> bool:
    """Whether a value is a dataclass, or an object that can be moved to a device as the graphs of torch_geometric can."""
    kind = type(value)
    moves = hasattr(kind, "__dataclass_fields__") or (
        hasattr(kind, "to") and not isinstance(value, nn.Module)
    )
    return moves and hasattr(value, "__dict__")


def floats_in(*values: Any) -> list[torch.Tensor]:
    """Floating tensors with at least two axes, in order."""
    found: list[torch.Tensor] = []
    for value in values:
        # Most calls take one tensor, and return one.
        only = value[0] if type(value) is tuple and len(value) == 1 else value
        if type(only) is torch.Tensor:
            if only.is_floating_point() and only.ndim >= 2:
                found.append(only)
        elif type(value) is not dict or value:  # keywords are mostly empty
            found += [each for each in tensors_in(value) if each.is_floating_point() and each.ndim >= 2]
    return found


def version(tensor: torch.Tensor | None) -> int | None:
    """How often a tensor was written in place; None in inference mode, where torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor of a replicated DTensor, and any other tensor as it is; CaptureError for a shard of one."""
    if split := split_over(tensor):
        raise split_error(split)
    # By attribute: importing DTensor needs torch.distributed, which some builds of torch lack.
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


def split_over(tensor: torch.Tensor) -> str:
    """How a DTensor is split over processes; empty where it is not."""
    placements = getattr(tensor, "placements", ())
    whole = all(placement.is_replicate() for placement in placements)
    return "" if whole else ", ".join(map(str, placements))


def split_error(placements: str) -> CaptureError:
    """The refusal of a state that is split over processes."""
    return CaptureError(
        f"a residual state is split over processes ({placements}); a part of it has other norms and spectra than the whole. "
        "Capture a model whose residual states are replicated, without sequence or tensor parallelism of the states"
    )


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has: of a DTensor its shard, of any other all."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor


Listener: TypeAlias = Callable[[Any, Any, Any, Any], None]
"""Called with an operation that has run, what it took (positional and by keyword), and what it gave."""


class OperationsShown(TorchDispatchMode):
    """Show every operation to a listener after it has run."""

    def __init__(self, listener: Listener):
        super().__init__()
        self._listener = listener

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every call of the method below; nothing is compiled while this mode is on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and show it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._listener(func, args, kwargs, result)
        return result
