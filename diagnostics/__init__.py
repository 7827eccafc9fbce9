"""Labelled arrays in, metrics and findings out: `analyze`, `judge`, every metric by name, runs on disk.

Imported without torch. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from diagnostics import schema
from diagnostics.schema import (
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

if TYPE_CHECKING:
    from diagnostics import kernels
    from diagnostics.analysis import analyze
    from diagnostics.catalogue import CATALOGUE
    from diagnostics.curves import training_curves
    from diagnostics.finding import Finding, Severity
    from diagnostics.metric import Metric, Range
    from diagnostics.replay import decay_factor, with_replay
    from diagnostics.verdicts import judge

_HOMES = {
    "analyze": "analysis",
    "CATALOGUE": "catalogue",
    "training_curves": "curves",
    "Finding": "finding",
    "Severity": "finding",
    "Metric": "metric",
    "Range": "metric",
    "decay_factor": "replay",
    "with_replay": "replay",
    "judge": "verdicts",
}

__all__ = [
    "CATALOGUE",
    "SCHEMA_VERSION",
    "Finding",
    "Metric",
    "Range",
    "SchemaError",
    "Severity",
    "analyze",
    "chain_dataset",
    "chains",
    "create_run",
    "decay_factor",
    "judge",
    "kernels",
    "list_runs",
    "open_run",
    "save_run",
    "schema",
    "training_curves",
    "validate",
    "with_replay",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _HOMES:
        return getattr(importlib.import_module(f"diagnostics.{_HOMES[name]}"), name)
    if importlib.util.find_spec(f"diagnostics.{name}"):  # a module, asked for before it was imported
        return importlib.import_module(f"diagnostics.{name}")
    catalogue = importlib.import_module("diagnostics.catalogue").CATALOGUE
    if name in catalogue:
        return catalogue[name]
    raise AttributeError(
        f"module 'diagnostics' has no attribute {name!r}; metrics are in diagnostics.CATALOGUE"
    )


def __dir__() -> list[str]:
    return sorted({*__all__, *importlib.import_module("diagnostics.catalogue").CATALOGUE})
