"""One forward of a model with every operation recorded, and what is read of it: for tests of the reading alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from depthscope.probes.reading.description import NetworkReading
from depthscope.probes.reading.graph import Graph, tensors_of
from depthscope.probes.reading.read import Rereading
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.reading.recording import recording
from depthscope.probes.session.model_call import call_model


def recorded(model: nn.Module, batch: Any) -> tuple[Graph, Any]:
    """The values of one forward, and what it returned."""
    recorder = GraphRecorder(model, list(tensors_of(batch)))
    with recording(recorder):
        output = call_model(model, batch)
    return recorder.end(output), output


def read_model(model: nn.Module, batch: Any) -> NetworkReading:
    """The reading of one forward, without gradients."""
    return Rereading(recorded(model, batch)[0]).reading
