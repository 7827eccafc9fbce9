"""Which operations run below autograd? Each is shown to a listener, as long as the mode is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch.utils._python_dispatch import TorchDispatchMode

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
