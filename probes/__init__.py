"""Probes: torch in, labelled arrays out. Attach them to a model, keep what its residual streams show."""

from probes.capture import capture
from probes.connections import ConnectionError, ReconstructionError
from probes.describe import describe
from probes.inputs import CaptureError
from probes.layout import LayoutError
from probes.merging import merge_runs
from probes.replay import initial_logits
from probes.sites import SiteError
from probes.static import describe_weights
from probes.tape import ChainError
from probes.training import ProbeWarning, Recorder, record

__all__ = [
    "CaptureError",
    "ChainError",
    "ConnectionError",
    "LayoutError",
    "ProbeWarning",
    "ReconstructionError",
    "Recorder",
    "SiteError",
    "capture",
    "describe",
    "describe_weights",
    "initial_logits",
    "merge_runs",
    "record",
]
