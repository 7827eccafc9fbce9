"""What is recorded of a forward of which every operation is looked at: its graph, and who listens to its operations."""

from __future__ import annotations

import math
from typing import Any

import torch

from depthscope.probes.reading.graph import Graph, ReadingError, TracedValue, ValuePlace
from depthscope.probes.reading.places import PlacedRecorder
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.structure.chain import HookPoint


class Tape:
    """The recorder of one forward; None until the model's own call begins."""

    def __init__(self) -> None:
        self.recorder: GraphRecorder | PlacedRecorder | None = None
        self.attention: Any = None  # what watches it, of the session
        self.routing: Any = None  # what watches the choices of routers, of the session
        self.logits: Any = None  # what watches these, of the session
        self.is_on = False  # whether the model's own forward has begun
        self.met: set[int] = set()  # numbers of the values that something took

    @property
    def graph(self) -> Graph:
        """The graph of the forward."""
        assert self.recorder is not None
        return self.recorder.graph

    def living(self, value: TracedValue) -> torch.Tensor | None:
        """The tensor of a value, if anything holds it still."""
        assert isinstance(self.recorder, GraphRecorder)
        return self.recorder.living(value)

    def recorded(self, point: HookPoint) -> TracedValue | None:
        """The value that a hook point shows in this forward; None where it shows none."""
        return value_at(self.graph, point)


def place_of(point: HookPoint) -> ValuePlace:
    """Where the operation is that shows a state which no call shows."""
    return ValuePlace(point.path, point.index, point.operation, point.item, point.result)


def value_at(graph: Graph, point: HookPoint) -> TracedValue | None:
    """The value that a hook point shows; None where it shows none in this forward."""
    if point.at == "operation":
        return graph.at(place_of(point))
    try:
        return graph.shown_at(point.path, point.index, point.at, point.item)
    except ReadingError:
        return None


def shown_when(graph: Graph, point: HookPoint) -> float:
    """When a point shows its state, in numbers of values: with an operation, or as a call begins or ends."""
    if point.streams:
        return max(shown_when(graph, of) for of in point.streams)
    if point.at == "operation":
        value = graph.at(place_of(point))
        return math.inf if value is None else value.number
    try:
        made = graph.made_in[graph.call_of(point.path, point.index)]
    except (ReadingError, KeyError):  # it was not called, or did not end
        return math.inf
    return made.start - 0.5 if point.at == "input" else made.stop - 0.5
