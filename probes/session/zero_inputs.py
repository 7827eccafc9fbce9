"""What do the modules of a model get? Weights that are multiplied by zeros, and batch norms whose data are others.

Seen in one forward, whatever made the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.convolution.default)
# A module with a larger share of input features that are 0 for every token gets hardly anything. This project.
DEAD = 0.95
# Fewer features may all be zero by chance.
FEWEST = 8
# By which factor the standard deviation of a typical channel differs from the running one, or by how many of the running ones
# its mean is apart, where the statistics are those of other data. This project.
FOREIGN = 3.0
BATCH_NORM = aten.native_batch_norm.default
# The arguments of a batch norm in evaluation.
MEAN, VARIANCE, TRAINING = 3, 4, 5


class ZeroInputs:
    """What the matrices and batch norms of a model get from any token, in any call."""

    def __init__(self, model: nn.Module):
        self._names = {
            p.untyped_storage()._cdata: name
            for name, p in model.named_parameters()
            if p.ndim > 1 and type(p) is nn.Parameter and p.layout is torch.strided
        }
        self._model = model
        self._norms: dict[int, str] = {}
        # By the name of a weight: which features of its input are not zero for some token.
        self._alive: dict[str, torch.Tensor] = {}
        self._foreign: dict[str, bool] = {}

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a product with a weight, or a batch norm, took."""
        if func is BATCH_NORM and not args[TRAINING]:
            self._note_norm(args)
        if func not in PRODUCTS:
            return
        given = [each for each in args if type(each) in (torch.Tensor, nn.Parameter) and each.ndim > 1]
        names = [self._names.get(each.untyped_storage()._cdata) for each in given]
        named = [name for name in names if name is not None]
        taken = [each for each, name in zip(given, names, strict=True) if name is None]
        # Of an expert without a token there is nothing to look at.
        if len(named) == len(taken) == 1 and taken[0].numel():
            alive = taken[0].transpose(1, -1).flatten(0, -2).ne(0).any(0)
            before = self._alive.get(named[0])
            # Of a weight that two products with inputs of different sizes share, the larger input counts.
            if before is None or len(before) < len(alive):
                self._alive[named[0]] = alive
            elif len(before) == len(alive):
                self._alive[named[0]] = before | alive

    def _note_norm(self, args: Any) -> None:
        taken, mean, variance = args[0], args[MEAN], args[VARIANCE]
        # Not before the forward, whose buffers are copies.
        self._norms = self._norms or {
            module.running_mean.untyped_storage()._cdata: name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        }
        name = self._norms.get(mean.untyped_storage()._cdata)
        rows = taken.transpose(1, -1).flatten(0, -2).float()
        if name is None or len(rows) < FEWEST:
            return
        running = variance.float().sqrt()
        known = running > 0
        apart = ((rows.mean(0) - mean.float()).abs() / running)[known]
        factor = (rows.std(0) / running)[known]
        if factor.numel():
            ratio = float(factor.median())
            found = float(apart.median()) > FOREIGN or not 1 / FOREIGN < ratio < FOREIGN
            self._foreign[name] = self._foreign.get(name, True) and found

    def modules(self) -> Mapping[str, list[str]]:
        """Their modules, in the order of the forward, by the kind of remark that says so."""
        # The input of the first weight is the data, where words and pixels may well be zero.
        dead = [
            name
            for number, (name, alive) in enumerate(self._alive.items())
            if not alive.any() or (number and len(alive) >= FEWEST and float((~alive).float().mean()) > DEAD)
        ]
        owners = dict.fromkeys(name.rpartition(".")[0] or name for name in dead)
        foreign = [name for name, is_foreign in self._foreign.items() if is_foreign]
        return {"zero_input": list(owners), "stale_statistics": foreign}
