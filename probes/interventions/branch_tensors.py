"""Where is what a branch reads of the streams, H_pre X, made, or what it gives? Found by its numbers, and changed there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from depthscope.probes.interventions.state_operations import (
    READ,
    Birthplace,
    Depth,
    Side,
    StateOperations,
    StatePlace,
)
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.tensor_memory import unseen_by_modes
from depthscope.probes.structure.chain import Chain


class BranchOutput(NamedTuple):
    """What the branch of a connection gives, as a place of an edit."""

    connection: int


class BranchTensors:
    """The inputs (B, T, V, D) of the branches of a chain, or their outputs (B, T, D), as the model makes them.

    ``chain``: whose connections these are.
    ``side``: whether they are inputs or outputs.
    ``expected``: their numbers in the unchanged forward, by connection.
    ``places``: where the states are made.
    ``tokens_first``: whether the model has the axis of the tokens before that of the sequences.
    """

    def __init__(
        self,
        chain: Chain,
        side: Side,
        expected: Mapping[int, torch.Tensor],
        places: Mapping[Depth, StatePlace],
        *,
        tokens_first: bool,
    ) -> None:
        self._chain, self._side, self._expected, self._tokens_first = chain, side, expected, tokens_first
        self._of_states = {of.operation for place in places.values() for of in place}
        self._found: dict[int, tuple[Birthplace, TracedValue]] = {}
        self._several: set[int] = set()

    def look(self, operations: StateOperations, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a tensor of the unchanged forward that has the expected numbers, and is made between its two states."""
        last = max((depth for _, depth in operations.met), default=-1)
        for number, expected in self._expected.items():
            link = self._chain.connections[number]
            if not link.depth_in <= last < link.depth_out or tensor.numel() != expected.numel():
                continue
            with unseen_by_modes(tensor):
                same = torch.equal(
                    self._canonical(number, tensor.detach()).to("cpu", torch.float32), expected
                )
            if not same:
                continue
            known = self._found.get(number)
            if known is not None:
                # A copy of the first one shows what was changed there; another tensor with the same numbers does not.
                self._several |= set() if _made_from(value, known[1]) else {number}
            elif (place := operations.birthplace(tensor)) is not None:
                self._found[number] = place, value

    def place(self, number: int) -> Birthplace:
        """Where the input or the output of a branch is made.

        Raises InterventionError: Where no tensor is known to be it, or it is a part of a state.
        """
        path = self._chain.connections[number].path
        where = (
            f"what the branch of connection {number} ({path!r}) {'reads' if self._side == READ else 'gives'}"
        )
        if number not in self._found:
            raise InterventionError(
                f"{where} is not a tensor that torch shows by itself; patch the state before it"
            )
        if number in self._several:
            raise InterventionError(
                f"{where} has the numbers of another tensor too; patch the state before it"
            )
        place, _ = self._found[number]
        if place.operation in self._of_states:
            raise InterventionError(f"{where} lies in the memory of a state; patch the state before it")
        return place

    def changed(
        self, number: int, native: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """A tensor of the model with its numbers, in the order of the axes here, changed."""
        changed = change(self._canonical(number, native)).to(native.dtype)
        return (changed.transpose(0, 1) if self._tokens_first else changed).reshape(native.shape)

    def _canonical(self, number: int, native: torch.Tensor) -> torch.Tensor:
        sequences, tokens, *rest = self._expected[number].shape
        if self._tokens_first:
            return native.reshape(tokens, sequences, *rest).transpose(0, 1)
        return native.reshape(sequences, tokens, *rest)


def _made_from(value: TracedValue, source: TracedValue) -> bool:
    """Whether a value was computed from an earlier one."""
    waiting, seen = [value], set[int]()
    while waiting:
        of = waiting.pop()
        if of is source:
            return True
        if of.number > source.number and of.number not in seen:
            seen.add(of.number)
            waiting += of.parents
    return False
