"""Probes: torch in, labelled arrays out. Attach them to a model, keep what its residual streams show."""

from depthscope.probes.connections.coefficients import ReconstructionError, StreamConnectionError
from depthscope.probes.description import describe
from depthscope.probes.history import probe_checkpoints
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.one_shot import capture
from depthscope.probes.settling import settle
from depthscope.probes.static.describe import describe_weights
from depthscope.probes.static.initial_logits import initial_logits
from depthscope.probes.structure.chain import ChainError
from depthscope.probes.structure.sites import SiteError
from depthscope.probes.training.live.findings import TrainingStopped
from depthscope.probes.training.notices import ProbeWarning
from depthscope.probes.training.record import record
from depthscope.probes.training.recorder import Recorder

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
    "initial_logits",
    "probe_checkpoints",
    "record",
    "settle",
]
