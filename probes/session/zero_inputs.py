"""Which weights are multiplied by nothing but zeros? Seen in one forward, whatever made the zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.convolution.default)


class ZeroInputs:
    """The matrices of a model that get no number but zero from any token, in any call: no token passes what is before them."""

    def __init__(self, model: nn.Module):
        self._names = {
            p.untyped_storage()._cdata: name
            for name, p in model.named_parameters()
            if p.ndim > 1 and type(p) is nn.Parameter and p.layout is torch.strided
        }
        self._zero: dict[str, bool] = {}

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a product with a weight took."""
        if func not in PRODUCTS:
            return
        given = [each for each in args if type(each) in (torch.Tensor, nn.Parameter) and each.ndim > 1]
        names = [self._names.get(each.untyped_storage()._cdata) for each in given]
        named = [name for name in names if name is not None]
        taken = [each for each, name in zip(given, names, strict=True) if name is None]
        # Of an expert without a token there is nothing to look at.
        if len(named) == len(taken) == 1 and taken[0].numel() and self._zero.get(named[0], True):
            self._zero[named[0]] = not bool(taken[0].any())

    def modules(self) -> list[str]:
        """Their modules, in the order of the forward."""
        return list(
            dict.fromkeys(name.rpartition(".")[0] or name for name, zero in self._zero.items() if zero)
        )
