"""What is measured? One file a question; every metric of the catalogue is here by its name."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    catalogue = importlib.import_module("depthscope.diagnostics.metrics.catalogue").CATALOGUE
    if name in catalogue:
        return catalogue[name]
    raise AttributeError(f"no metric {name!r}; the names are in depthscope.CATALOGUE")


def __dir__() -> list[str]:
    return sorted(importlib.import_module("depthscope.diagnostics.metrics.catalogue").CATALOGUE)
