"""What is in a compiled graph of ours that is not the user's? Two operations, which hand out a value and its gradient.

``take`` reads a value when it is computed, and ``gradient`` its gradient in the backward. Both are opaque to the compiler,
write into nothing of the user's, and know by a ticket, a tensor of one number that is given to the graph, which call of which
model runs: one graph serves all calls and all blocks that share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from depthscope.probes.model.hooks import Report, call_safely, in_recomputation
from depthscope.probes.model.user_modes import AUTOCAST_DEVICES

Receiver = Callable[[torch.Tensor, Callable[..., torch.Tensor]], None]
BEGIN = -1  # the place by which a graph tells which of its inputs is the ticket


class _StandIn(torch.autograd.Function):
    """A tensor in the place of a value of the compiled graph, whose hooks run when the gradient of that arrives."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_zeros(()), None


class RunningCall:
    """One call of a compiled graph of ours, and what is done with its values.

    ``receivers``: for each place ``receive(value, stand_in)``: the value, which lives on in the call alone, and a function
    that makes a tensor in its place, from numbers of its shape.
    ``listened``: the places whose values have a gradient.
    """

    def __init__(self, receivers: Sequence[Receiver], report: Report, listened: set[int]):
        self.ticket = next(_tickets)
        # Compiled code runs outside of the user's autocast, which tells in which type states are multiplied.
        self._autocast = [name for name in AUTOCAST_DEVICES if torch.is_autocast_enabled(name)]
        self._receivers, self._report, self.listened = receivers, report, listened
        self._stand_ins: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def open(self) -> torch.Tensor:
        """The ticket, with which the call is known until `remove`."""
        _calls[self.ticket] = self
        return torch.tensor([self.ticket])

    def remove(self) -> None:
        """Let go of the call: what its graph hands out from now on goes nowhere."""
        _calls.pop(self.ticket, None)
        self._stand_ins.clear()

    def take(self, place: int, value: torch.Tensor) -> None:
        """Hand a value to its receiver."""

        def stand_in(numbers: torch.Tensor | None = None) -> torch.Tensor:
            leaf = torch.zeros((), dtype=value.dtype, device=value.device).requires_grad_()
            shown = value.new_zeros(()).expand(value.shape) if numbers is None else numbers
            with torch.enable_grad():
                found = _StandIn.apply(leaf, shown)
            self._stand_ins.setdefault(place, []).append((found, leaf))
            return found

        off = [name for name in self._autocast if not torch.is_autocast_enabled(name)]
        for name in off:
            torch.set_autocast_enabled(name, True)
        try:
            call_safely(self._report, self._receivers[place], value, stand_in)
        finally:
            for name in off:
                torch.set_autocast_enabled(name, False)

    def receive(self, place: int, gradient: torch.Tensor) -> None:
        """Run the hooks of the tensors that stand for a value."""
        for found, leaf in self._stand_ins.get(place, ()):
            torch.autograd.grad(found, leaf, gradient, retain_graph=True)


_tickets = itertools.count()
_calls: dict[int, RunningCall] = {}


def _take(value: torch.Tensor, ticket: torch.Tensor, place: int) -> None:
    # A backward that runs a part of the graph once more has been through here already.
    call = None if place == BEGIN or in_recomputation() else _calls.get(int(ticket))
    if call is not None:
        call.take(place, value)


def _gradient(value: torch.Tensor, ticket: torch.Tensor, place: int) -> torch.Tensor:
    call = _calls.get(int(ticket))
    if call is not None:
        call.receive(place, value)
    return value.clone()


# As the schema tells, `take` writes into the ticket: so no compiler leaves it out, or changes the order of two of them.
_unsafe = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
take = torch.library.custom_op(
    "depthscope::take",
    _take,
    mutates_args=("ticket",),
    schema="(Tensor value, Tensor(a!) ticket, int place) -> ()",
    **_unsafe,
)
gradient = torch.library.custom_op(
    "depthscope::gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor value, Tensor ticket, int place) -> Tensor",
    **_unsafe,
)
take.register_fake(lambda value, ticket, place: None)
gradient.register_fake(lambda value, ticket, place: torch.empty_like(value))


_listened: list[set[int]] = []


@contextmanager
def noting(places: set[int]) -> Iterator[None]:
    """Note the places whose values turn out to have a gradient, while a graph is compiled."""
    _listened.append(places)
    try:
        yield
    finally:
        _listened.pop()


def listen(value: torch.Tensor, ticket: torch.Tensor, place: int) -> None:
    """Put ``gradient`` into the backward of a value; called by the compiler, while it derives the backward of a graph."""
    if value.requires_grad and torch.is_grad_enabled():
        if _listened:
            _listened[-1].add(place)
        else:  # a backend that runs the functions of the graph as they are
            call = _calls.get(int(ticket))
            if call is not None:
                call.listened.add(place)
        value.register_hook(lambda given: torch.ops.depthscope.gradient(given, ticket, place))


torch.fx.node.has_side_effect(listen)
