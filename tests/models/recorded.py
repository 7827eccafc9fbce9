"""One forward of a model with every operation recorded, and what is read of it: for tests of the reading alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depthscope.probes.reading.graph import Graph, tensors_of
from depthscope.probes.reading.read import Rereading
from depthscope.probes.reading.recorder import GraphRecorder, recording
from depthscope.probes.session.model_call import call_model
from tests.models.designs.design import Design
from tests.models.designs.truth import SEED


def recorded(model: nn.Module, batch: Any) -> tuple[Graph, Any]:
    """The values of one forward, and what it returned."""
    recorder = GraphRecorder(model, list(tensors_of(batch)))
    with recording(recorder):
        output = call_model(model, batch)
    return recorder.end(output), output


def read_model(model: nn.Module, batch: Any) -> Rereading:
    """The reading of one forward, without gradients."""
    return Rereading(recorded(model, batch)[0])


def reading_of(design: Design) -> Rereading:
    """The reading of a design's first batch."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return read_model(design.build(), design.batch(0))
