"""What people get wrong in the networks of `held_out`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def after(change: Any, block: int = 2) -> Any:
    def touch(model: Any) -> None:
        model.blocks[block].after = change

    return touch


def everywhere(change: Any) -> Any:
    def touch(model: Any) -> None:
        for block in model.blocks:
            block.after = change

    return touch


def looking_ahead(model: Any) -> None:
    for block in model.blocks:
        block.branches[0].causal = False


def edits(change: Any, only: int | None = None) -> Any:
    """Change the coefficients of every connection, or of one."""

    def touch(model: Any) -> None:
        mixings = [each for block in model.blocks for each in block.mixings]
        for number, mixing in enumerate(mixings):
            if only is None or number == only:
                mixing.edit = lambda weights: change(*weights)

    return touch


def gain(factor: float, only: int | None = None) -> Any:
    return edits(lambda pre, post, res: (pre, post, factor * res), only)


def factors(which: str, value: float, others: float = 1.0) -> Any:
    scale = torch.full((4,), others)
    scale[1] = value

    def change(pre, post, res):
        return (pre * scale, post, res) if which == "pre" else (pre, post * scale, res)

    return edits(change)


def held_as_copies(model: Any) -> None:
    model.offsets.requires_grad_(False)
    for block in model.blocks:
        for mixing in block.mixings:
            mixing.pre.data.zero_()
            mixing.post.data.zero_()
            mixing.res.data = 3.0 * torch.eye(4)
            mixing.scale.data.zero_()
            mixing.requires_grad_(False)


def starved_expert(model: Any) -> None:
    for block in model.blocks:
        block.branches[1].bias[0] = -1e9


def stale_norms(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
