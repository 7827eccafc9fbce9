"""What is measured? One file a question; every metric of the catalogue is an attribute: `depthscope.metrics.cka`."""

from __future__ import annotations

import importlib
from typing import Any

# Looked up when used: the modules of this package import from it, so that it cannot import the catalogue.


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # Python asks for these while it imports
        raise AttributeError(name)
    catalogue = importlib.import_module("depthscope.diagnostics.metrics.catalogue").CATALOGUE
    if name in catalogue:
        return catalogue[name]
    raise AttributeError(f"no metric {name!r}; the names are in depthscope.CATALOGUE")


def __dir__() -> list[str]:
    return sorted(importlib.import_module("depthscope.diagnostics.metrics.catalogue").CATALOGUE)
