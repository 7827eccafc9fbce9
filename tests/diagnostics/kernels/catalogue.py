"""Which kernels are there? Every public function of a module of kernels, by name."""

import importlib
import inspect
from collections.abc import Callable


def public_kernels(module: str) -> dict[str, Callable]:
    """Functions that ``depthscope.diagnostics.kernels.<module>`` defines and shows, wherever in its package they live."""
    found = importlib.import_module(f"depthscope.diagnostics.kernels.{module}")
    return {
        f"{module}.{name}": value
        for name, value in inspect.getmembers(found, inspect.isfunction)
        if not name.startswith("_") and value.__module__.startswith(found.__name__)
    }
