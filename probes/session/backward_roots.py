"""What does a backward begin at? The tensors that the user called it on, which add up to the loss of a step."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch.utils.hooks import RemovableHandle

from depthscope.probes.model.hooks import Hook, Report
from depthscope.probes.model.loss_graph import compared_by_gradient, read_task, squares_by_gradient
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.graph import walk
from depthscope.probes.session.forward import own_calls

RUN_BACKWARD = torch.autograd.graph._engine_run_backward.__code__
Edge: TypeAlias = tuple[Any, int]  # a node of a graph of autograd, and the number of its output


def edges_behind(start: Iterable[Edge], until: Collection[Edge] = ()) -> Iterator[Edge]:
    """The edges of a graph of autograd from some on, as (node, number of its output); none behind those in ``until``."""

    def behind(edges: Iterable[Edge]) -> list[Edge]:
        return [edge for edge in edges if edge[0] is not None]

    return walk(behind(start), lambda edge: [] if edge in until else behind(edge[0].next_functions))


def running_backward() -> list[Edge] | None:
    """The roots of the backward that runs this hook, as edges; None where they cannot be found."""
    frame = _running_frame()
    if frame is None:
        return None
    roots = frame.f_locals.get("t_outputs", ())
    return [(r.grad_fn, r.output_nr) if isinstance(r, torch.Tensor) else tuple(r) for r in roots]


def _running_frame() -> FrameType | None:
    """The call that runs this hook.

    torch does not tell it, but the function that runs the engine waits for it with the roots among its variables: in this
    thread, or for tensors on another device in the one that called it.
    """
    for frame in (sys._getframe(), *sys._current_frames().values()):
        place: FrameType | None = frame
        while place is not None:
            if place.f_code is RUN_BACKWARD:
                return place
            place = place.f_back
    return None


def living_scalers() -> list[torch.amp.GradScaler]:
    """All scalers of the process that scale a loss."""
    # By their type: isinstance asks the objects themselves, some of which answer with a warning.
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
    return [scaler for scaler in found if scaler.is_enabled()]


class StepLoss:
    """The loss of a step, where the user does not give it: the sum of the scalars whose backward reached the model.

    Of micro-batches each loss is that share of the step's which the loop calls the backward on.

    ``loss_scale``: gives the factor by which losses are multiplied at present; None where no scaler is known.
    ``report``: called with every exception of ours.
    """

    def __init__(self, loss_scale: Callable[[], torch.Tensor | None] | None, report: Report) -> None:
        self._loss_scale, self._report = loss_scale, report
        self._handles: list[RemovableHandle] = []
        self._roots: list[torch.Tensor] = []
        self.backwards: set[int] = set()  # that have reached what the model returned
        self._is_scalar = True  # whether every backward began at one number
        self._is_product = False  # whether one began at a product, as of a loss and its scale
        self._is_scaled: bool | None = None  # by a scaler that nobody named
        self.task: dict[str, Any] = {}  # what the loss is of, as its graph says

    def listen(self, output: Any) -> None:
        """Put hooks on what a call of the model returned; they leave at the end of the step."""
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None and own_calls.owner is None:
                hook = Hook(partial(self._note, tensor.detach()), self._report)
                self._handles.append(tensor.register_hook(hook))

    def _note(self, given: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Note the roots of the backward that runs: once, however many outputs it reaches."""
        frame, backward = _running_frame(), torch._C._current_graph_task_id()
        if frame is None or backward in self.backwards or not frame.f_locals["kwargs"].get("accumulate_grad"):
            return  # `torch.autograd.grad` computes a part of a loss, such as a penalty
        self.backwards.add(backward)
        scale = None if self._loss_scale is None else self._loss_scale()
        for root in frame.f_locals["t_outputs"]:
            if not isinstance(root, torch.Tensor) or root.numel() != 1:
                # Such as a stage of a pipeline, which gets its gradient from the next one.
                self._is_scalar = False
                return
            self._is_product |= root.grad_fn is not None and root.grad_fn.name() == "MulBackward0"
            self.task = self.task or read_task(root, None)
            value = root.detach().float().reshape(())
            self._roots.append(value.clone() if scale is None else value / scale.to(value.device))
        # The graph of a loss that the loop computes is gone when the gradient reaches the output.
        if len(self._roots) != 1 or "constant" in self.task or gradient is None:
            return
        unscaled = gradient if scale is None else gradient / scale.to(gradient.device)
        self.task |= (
            compared_by_gradient(unscaled, self.task["classes"], float(self._roots[0]))
            if "classes" in self.task
            else squares_by_gradient(root, given, unscaled)
        )

    def value(self) -> float | None:
        """Of the present step; None where no backward reached the model, or by what its loss was scaled is not known."""
        if not self._roots or not self._is_scalar:
            return None
        if self._loss_scale is None and self._is_product:
            # Once: it takes some milliseconds for every 100 000 objects of the program.
            if self._is_scaled is None:
                self._is_scaled = bool(living_scalers())
            if self._is_scaled:
                return None
        return float(torch.stack([root.cpu() for root in self._roots]).sum())

    def clear(self) -> None:
        """Begin the next step."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._roots = [], []
        self._is_scalar, self._is_product = True, False
        self.task = {}
        self.backwards.clear()
