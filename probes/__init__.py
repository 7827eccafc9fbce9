"""Probes: torch in, labelled arrays out. Attach them to a model, keep what its residual streams show.

Names are loaded when they are first used: a capture imports no metric, verdict or experiment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  without it the package is refused here, and not where one of its names is used

if TYPE_CHECKING:
    from depthscope.probes import interventions
    from depthscope.probes.connections.proof import ReconstructionError, StreamConnectionError
    from depthscope.probes.description import describe
    from depthscope.probes.history import probe_checkpoints
    from depthscope.probes.model.errors import CaptureError
    from depthscope.probes.model.layout import LayoutError
    from depthscope.probes.one_shot import capture
    from depthscope.probes.settling import settle
    from depthscope.probes.static.describe import describe_weights
    from depthscope.probes.structure.chain import ChainError
    from depthscope.probes.structure.sites import SiteError
    from depthscope.probes.training.notices import ProbeWarning, TrainingStopped
    from depthscope.probes.training.record import record
    from depthscope.probes.training.recorder import Recorder

# Where a name is defined, below this package.
_HOMES = {
    "CaptureError": "model.errors",
    "ChainError": "structure.chain",
    "LayoutError": "model.layout",
    "ProbeWarning": "training.notices",
    "ReconstructionError": "connections.proof",
    "Recorder": "training.recorder",
    "SiteError": "structure.sites",
    "StreamConnectionError": "connections.proof",
    "TrainingStopped": "training.notices",
    "capture": "one_shot",
    "describe": "description",
    "describe_weights": "static.describe",
    "probe_checkpoints": "history",
    "record": "training.record",
    "settle": "settling",
}

__all__ = [
    "CaptureError",
    "ChainError",
    "LayoutError",
    "ProbeWarning",
    "ReconstructionError",
    "Recorder",
    "SiteError",
    "StreamConnectionError",
    "TrainingStopped",
    "capture",
    "describe",
    "describe_weights",
    "interventions",
    "probe_checkpoints",
    "record",
    "settle",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "interventions":
        return importlib.import_module(f"{__name__}.interventions")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names: {', '.join(__all__)}")
