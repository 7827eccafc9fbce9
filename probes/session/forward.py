"""What was seen in one call of the model, and what whole calls with the same weights add up to."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.reading import Opening
from depthscope.probes.session.reservoir import Sequence
from depthscope.probes.statistics.token_sums import Sums, merged

FINAL = -1  # stands for a depth: the state behind the last norm

Spot = tuple[int, int]  # the number of a chain, and a depth or a connection of it


@dataclass
class Listener:
    """The gradient hook on one tensor of the first forward, which may turn out to be a state."""

    tensor: weakref.ref[torch.Tensor]
    key: Spot | None = None


@dataclass
class Forward:
    """What was seen in one call of the model."""

    batch_size: int
    stamp: int
    first_index: int
    slots: dict[int, int]
    arguments: Mapping[str, Any]
    decoding: bool
    rows: torch.Tensor
    lead_shape: tuple[int, ...]
    row_data: torch.Tensor | None
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)
    states: dict[Spot, torch.Tensor] = field(default_factory=dict)
    gradients: dict[Spot, torch.Tensor] = field(default_factory=dict)
    hooked: set[Spot] = field(default_factory=set)
    arrived: set[Spot] = field(default_factory=set)
    watched: dict[tuple[int, int | None], Listener] = field(default_factory=dict)
    parts: dict[Spot, Parts] = field(default_factory=dict)
    branches: dict[Spot, torch.Tensor] = field(default_factory=dict)
    openings: dict[str, list[Opening]] = field(default_factory=dict)
    fired: set[tuple[str, int, int]] = field(default_factory=set)
    sums: list[Sums] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def turn(self, kind: str, path: str) -> int:
        """Index of this call among the calls of one module in this forward."""
        index = self.counts.get((kind, path), 0)
        self.counts[kind, path] = index + 1
        return index

    def ended(self) -> None:
        """Let go of what only the forward itself needs: its batch must not outlive it."""
        self.watched.clear()
        self.openings.clear()
        self.arguments = {}

    def let_go(self) -> None:
        """Let go of the user's tensors; one whose gradient hook holds what holds it would live on."""
        self.ended()
        self.sources.clear()

    def chain_sums(self, number: int) -> Sums:
        """The sums of one chain."""
        while len(self.sums) <= number:
            self.sums.append(Sums())
        return self.sums[number]

    def sampled(self, tensor: torch.Tensor) -> torch.Tensor:
        """A float32 copy of the sampled sequences of a tensor (B, …)."""
        return tensor[self.rows.to(tensor.device)].float()

    def sequences(self) -> list[tuple[int, Sequence]]:
        """The sampled sequences, on the CPU, with their slots."""
        kept = []
        for position, row in enumerate(self.rows.tolist()):
            masks = {number: mask[row].cpu() for number, mask in self.masks.items() if mask is not None}
            sequence = Sequence(
                index=self.first_index + row,
                mask=masks,
                states=_pick(self.states, position),
                gradients=_pick(self.gradients, position),
                parts={key: parts.at(position).detached() for key, parts in self.parts.items()},
                branches=_pick(self.branches, position),
                decoding=self.decoding,
                row=None if self.row_data is None else self.row_data[position].cpu().clone(),
            )
            kept.append((self.slots[row], sequence))
        return kept


def _pick(tensors: Mapping[Any, torch.Tensor], position: int) -> dict[Any, torch.Tensor]:
    return {key: tensor[position].cpu().clone() for key, tensor in tensors.items()}


@dataclass
class Measured:
    """What whole forwards with the same weights add up to."""

    stamp: int
    batch_size: int
    sums: list[Sums]

    def add(self, forward: Forward) -> None:
        """Add one more forward."""
        self.batch_size += forward.batch_size
        self.sums = merged(self.sums, forward.sums)
