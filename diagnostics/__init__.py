"""Labelled arrays in, metrics and findings out: `analyze`, `judge`, every metric by name, runs on disk.

Imported without torch. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthscope.diagnostics import kernels, schema
    from depthscope.diagnostics.analysis.analyze import analyze
    from depthscope.diagnostics.analysis.training_curves import training_curves
    from depthscope.diagnostics.errors import DepthscopeError
    from depthscope.diagnostics.metrics.catalogue import CATALOGUE
    from depthscope.diagnostics.metrics.declaration import Metric, Range
    from depthscope.diagnostics.schema import (
        SCHEMA_VERSION,
        SchemaError,
        chain_dataset,
        chains,
        create_run,
        list_runs,
        open_run,
        save_run,
        validate,
    )
    from depthscope.diagnostics.verdicts import judge
    from depthscope.diagnostics.verdicts.finding import Finding, Severity

# Where a name is defined, below this package. Not imported at the top: `import depthscope` is to take milliseconds.
_HOMES = {
    "analyze": "analysis.analyze",
    "CATALOGUE": "metrics.catalogue",
    "training_curves": "analysis.training_curves",
    "Finding": "verdicts.finding",
    "Severity": "verdicts.finding",
    "Metric": "metrics.declaration",
    "Range": "metrics.declaration",
    "judge": "verdicts",
    "DepthscopeError": "errors",
} | dict.fromkeys(
    (
        *("SCHEMA_VERSION", "SchemaError", "chain_dataset", "chains", "create_run", "list_runs"),
        *("open_run", "save_run", "validate"),
    ),
    "schema",
)

__all__ = [
    "CATALOGUE",
    "SCHEMA_VERSION",
    "DepthscopeError",
    "Finding",
    "Metric",
    "Range",
    "SchemaError",
    "Severity",
    "analyze",
    "chain_dataset",
    "chains",
    "create_run",
    "judge",
    "kernels",
    "list_runs",
    "open_run",
    "save_run",
    "schema",
    "training_curves",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # Python asks for these while it imports
        raise AttributeError(name)
    if name in _HOMES:
        return getattr(importlib.import_module(f"depthscope.diagnostics.{_HOMES[name]}"), name)
    # A sub-package that nothing has imported yet: `diagnostics.kernels` works right after `import depthscope`.
    if importlib.util.find_spec(f"depthscope.diagnostics.{name}"):
        return importlib.import_module(f"depthscope.diagnostics.{name}")
    catalogue = importlib.import_module("depthscope.diagnostics.metrics.catalogue").CATALOGUE
    if name in catalogue:
        return catalogue[name]
    raise AttributeError(
        f"module 'depthscope.diagnostics' has no attribute {name!r}; metrics are in depthscope.CATALOGUE"
    )


def __dir__() -> list[str]:
    return sorted({*__all__, *importlib.import_module("depthscope.diagnostics.metrics.catalogue").CATALOGUE})
