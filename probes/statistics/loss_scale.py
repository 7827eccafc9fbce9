"""By which factor was the loss scaled? Read from the user's gradient scaler while the backward runs."""

from __future__ import annotations

import torch

from depthscope.diagnostics.errors import InputError


class LossScale:
    """The scale of a gradient scaler, read as a tensor inside the backward, before the scaler changes it.

    ``scaler``: the scaler that multiplies the user's loss.
    Raises InputError: For something that is not a ``torch.amp.GradScaler``.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise InputError(
                f"scaler is a {type(scaler).__name__}; expected the torch.amp.GradScaler that scales the loss"
            )
        self._scaler = scaler
        self._first: torch.Tensor | None = None  # of the present step

    def __call__(self) -> torch.Tensor | None:
        """The present scale, on the scaler's device; divide by it at once, since ``scaler.update`` overwrites it.

        Returns: None without a scaler, with a disabled one, and before it scaled anything.
        """
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        # The private tensor: get_scale() reads it back, and inside a backward nothing may wait for the device.
        scale = self._scaler._scale
        if self._first is None and scale is not None:
            self._first = scale.detach().clone()
        return scale

    def end(self) -> float | None:
        """End a step: the scale of its first gradient, read back from the device; None where no gradient was divided."""
        first, self._first = self._first, None
        return None if first is None else float(first)
