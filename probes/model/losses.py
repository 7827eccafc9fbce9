"""What is the loss of an output? What the user's function gives, or the output's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from depthscope.probes.model.errors import CaptureError

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]


def loss_value(output: Any, batch: Any, loss: Loss | None, *, required: bool) -> torch.Tensor | None:
    """The scalar loss of an output: what the user's function gives, or the output's own.

    ``output, batch``: what the model returned, and for what.
    Raises CaptureError: Where there must be a loss and there is no scalar.
    """
    if loss is not None:
        value = loss(output, batch)
    else:
        value = getattr(output, "loss", None)
        if value is None and isinstance(output, Mapping):
            value = output.get("loss")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value
    if required or loss is not None:
        came = (
            "no loss"
            if value is None
            else f"a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        )
        raise CaptureError(
            f"gradients need a scalar loss, but got {came}: add labels to the batch, or pass "
            "loss=lambda output, batch: … (on the command line: --no-gradients)"
        )
    return None
