"""How is a training loop followed? The recorder and its steps, in a loop of one's own or in that of a framework."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthscope.probes.training.lightning_callback import LightningCallback
    from depthscope.probes.training.transformers_callback import TransformersCallback

__all__ = ["LightningCallback", "TransformersCallback"]

_FILES = {"TransformersCallback": "transformers_callback", "LightningCallback": "lightning_callback"}


# Each needs its framework, which is imported when the name is first used.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _FILES:
            return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its callbacks: {', '.join(_FILES)}"
        )
