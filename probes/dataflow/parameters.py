"""Which parameter is a small constant of a forward, and by which functions was it made of it? Noted as the forward runs.

A scale is applied as it is stored (``gamma * branch``), as a view of it, cast, or as a function of it (``1 + w``).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class AppliedFunction:
    """One function of one tensor: ``args`` has None in the tensor's place."""

    func: Any
    position: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The result for another tensor."""
        return self.func(*self.args[: self.position], tensor, *self.args[self.position + 1 :], **self.kwargs)


@dataclass(frozen=True, eq=False)
class ConstantOrigin:
    """A parameter, and the functions by which a constant was made of it, first to last."""

    parameter: nn.Parameter
    functions: tuple[AppliedFunction, ...] = ()


class ParameterConstants:
    """The vectors and numbers that a forward made of one parameter each."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], ConstantOrigin]] = {}

    def origin(self, tensor: Any) -> ConstantOrigin | None:
        """The parameter that a tensor is, or was made of; None where it is no vector, or was made of something else."""
        if not isinstance(tensor, torch.Tensor) or not _is_vector(tensor):
            return None
        if isinstance(tensor, nn.Parameter):
            return ConstantOrigin(tensor)
        reference, origin = self._made.get(id(tensor), (None, None))
        # The identity of a tensor that is gone is given out again.
        return origin if reference is not None and reference() is tensor else None

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an operation that took no value of the forward."""
        tensors = [at for at, each in enumerate(args) if isinstance(each, torch.Tensor)]
        others = any(isinstance(each, (torch.Tensor, list, tuple)) for each in kwargs.values())
        if len(tensors) != 1 or others or not isinstance(result, torch.Tensor) or not _is_vector(result):
            return
        (position,) = tensors
        origin = self.origin(args[position])
        if origin is not None:
            rest = (*args[:position], None, *args[position + 1 :])
            functions = (*origin.functions, AppliedFunction(func, position, rest, dict(kwargs)))
            self._made[id(result)] = weakref.ref(result), ConstantOrigin(origin.parameter, functions)


def _is_vector(tensor: torch.Tensor) -> bool:
    """Whether it is one number or a vector, also one of the shape (C, 1, 1)."""
    return tensor.numel() == max(tensor.shape, default=1)
