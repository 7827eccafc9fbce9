"""By what was the loss multiplied? What the user's gradient scaler says while its backward runs."""

from __future__ import annotations

import torch


class LossScale:
    """The scale of a gradient scaler, read as a tensor inside the backward, before the scaler changes it.

    Parameters
    ----------
    scaler : GradScaler or None
        The scaler that multiplies the user's loss; None where there is none.

    Raises
    ------
    ValueError
        For something that is not a ``torch.amp.GradScaler``.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise ValueError(
                f"scaler is a {type(scaler).__name__}; expected the torch.amp.GradScaler that scales the loss"
            )
        self._scaler = scaler
        self._seen: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor | None:
        """The scale now, on the scaler's device; divide by it at once, since `update` rewrites it in place.

        Returns
        -------
        Tensor or None
            None without a scaler, with one that is switched off, and before it scaled anything.
        """
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        # get_scale() would wait for the device; inside a backward nothing may
        scale = self._scaler._scale
        if self._seen is None and scale is not None:
            self._seen = scale.detach().clone()
        return scale

    def end(self) -> float | None:
        """The scale of the step's first gradient, read back from the device; and get ready for the next step.

        Returns
        -------
        float or None
            None where no gradient was divided.
        """
        seen, self._seen = self._seen, None
        return None if seen is None else float(seen)
