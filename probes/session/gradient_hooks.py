"""How is the gradient of a state received? By a hook at its node of the graph, or from the backward that ends there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Hook, Report

if TYPE_CHECKING:
    from depthscope.probes.session.forward import Forward, TensorKey

Receive = Callable[[torch.Tensor | None], None]


class GradientListener:
    """Receives the gradient of what a tensor holds now, in every backward that goes on below it.

    It listens at the node of the graph: a hook on a tensor stays at what the tensor held when its first hook came, also where
    it is written in place later, and so would every later hook of the user's.
    """

    def __init__(self, tensor: torch.Tensor, report: Report):
        # Several where one value is a state of two chains; none until it is known to be a state.
        self.receivers: list[Receive] = []
        self.num_received = 0
        self.end: torch.Tensor | GradientEdge | None  # where the graph of the tensor begins
        self.handle: RemovableHandle
        if tensor.grad_fn is None:
            self.end, self._number = tensor, 0
            self.handle = tensor.register_hook(Hook(self.receive, report))
        else:
            self.end, self._number = get_gradient_edge(tensor), tensor.output_nr
            self.handle = tensor.grad_fn.register_prehook(Hook(self._at_node, report))

    @property
    def node(self) -> Any:
        """The node at which the graph of the tensor begins."""
        assert self.end is not None, "the forward was released"
        return (get_gradient_edge(self.end) if isinstance(self.end, torch.Tensor) else self.end).node

    def release(self) -> None:
        """Listen no more, and let go of the graph."""
        self.handle.remove()
        self.end = None

    def receive(self, gradient: torch.Tensor | None) -> None:
        """Hand a gradient to all receivers."""
        self.num_received += 1
        for receive in self.receivers:
            receive(gradient)

    def _at_node(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        self.receive(gradients[self._number])


def backward_to(
    forward: Forward, ends: Sequence[TensorKey], outputs: Sequence[torch.Tensor], **options: Any
) -> None:
    """Run a backward that ends at some states: no parameter's ``.grad`` is written, no hook of the user's on it runs.

    ``forward``: one that was not released.
    ``options``: of `torch.autograd.grad`.
    """
    listeners = [forward.expected_gradients[key] for key in ends]
    before = [listener.num_received for listener in listeners]
    # allow_unused: the loss may not depend on a chain, such as that of a frozen encoder.
    edges = [listener.end for listener in listeners if listener.end is not None]
    try:
        found = torch.autograd.grad(outputs, edges, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise CaptureError(
            "the model computes blocks again in its backward, by torch.utils.checkpoint with use_reentrant=True, which can "
            "end at no state; call checkpoint with use_reentrant=False, or capture without gradients"
        ) from error
    for listener, times, gradient in zip(listeners, before, found, strict=True):
        if listener.num_received == times:  # nothing below its node was run
            listener.receive(gradient)
