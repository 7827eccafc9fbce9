"""What is a design? A small model of published code, how it is called, and what its code says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.models.designs import truth as notes
from tests.models.designs.parts import tokens


@dataclass(frozen=True)
class Design:
    """One design.

    Parameters
    ----------
    name : str
        What it is, and how it is written.
    make : callable
        Makes the model; `build` seeds it.
    batch : callable
        Makes a batch from a seed.
    family : str
        What a run may call it, several names between bars; empty where it is no residual network at all.
    constraint : str
        What its mixing matrices satisfy, in words between commas that a run must use; empty where it is nothing in particular.
    training : bool
        Whether it is called in training mode.
    layers, layout, streams : str or tuple of str, str, int
        Where its blocks are, and how its states are laid out: what its author would answer to a question of ours.
    branches_named : bool
        Whether ``layers`` names branches, as there are no blocks: a state after one of them is then rightly called «post».
    labelled : bool
        Whether its blocks have numbers on which everybody agrees; else the labels of states are not compared.
    rounding : float
        Of its states, relative to the largest of them.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any] = tokens
    family: str = "residual"
    constraint: str = ""
    training: bool = False
    layers: str | tuple[str, ...] = "blocks.{i}"
    branches_named: bool = False
    layout: str = "B T D"
    streams: int = 1
    labelled: bool = True
    rounding: float = 1e-5

    def build(self, seed: int = 0) -> nn.Module:
        """The model, the same for a seed in every process."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make().train(self.training)

    def answers(self) -> dict[str, Any]:
        """The overrides that the design's author would give."""
        streams = {"streams": self.streams} if self.streams > 1 else {}
        return {"layers": self.layers, "layout": self.layout, **streams} if self.layers else {}

    def truth(self, model: nn.Module, *batches: Any, loss: Any = None) -> notes.Truth:
        """What the model's own code says of its states and connections on some batches; with a loss, of gradients too."""
        return notes.written(model, *batches, loss=loss)
