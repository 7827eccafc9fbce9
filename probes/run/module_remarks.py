"""What is odd about single modules? Batch norms that were trained and whose running statistics were never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAMED = 3  # modules in a sentence


def module_remarks(model: nn.Module) -> list[dict[str, Any]]:
    """Remarks in the form of those about connections; empty where nothing is odd."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    stale = [name for name, module in norms.items() if not module.training and _is_stale(module)]
    if not stale:
        return []
    more = f" and {len(stale) - NAMED} more" if len(stale) > NAMED else ""
    sentence = (
        f"{len(stale)} of {len(norms)} batch norms ({', '.join(stale[:NAMED])}{more}) have trained weights, and running "
        "statistics of mean 0 and variance 1 as they were made"
    )
    value = float(len(stale))
    return [
        {"kind": "stale_statistics", "sentence": sentence, "value": value, "connections": [], "sure": True}
    ]


def _is_stale(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether its weights have moved from 1 and 0, and its statistics have not."""
    known = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if any(not isinstance(each, torch.Tensor) or each.is_meta for each in known):
        return False
    moved = bool((norm.weight != 1).any()) or bool((norm.bias != 0).any())
    return moved and bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())
