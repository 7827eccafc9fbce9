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
        What its mixing matrices satisfy, in words; empty where it has none.
    training : bool
        Whether it is called in training mode.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any] = tokens
    family: str = "residual"
    constraint: str = ""
    training: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The model, the same for a seed in every process."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make().train(self.training)

    def truth(self, model: nn.Module, batch: Any) -> notes.Truth:
        """What the model's own code says of its states and connections on this batch."""
        return notes.written(model, batch)
