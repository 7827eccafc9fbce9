"""Where else do the numbers of a step go, and with which learning rate was it made? TensorBoard, W&B, torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from depthscope.probes.model.hooks import Hook, Report


class LearningRate:
    """The rate of the first group of parameters of an optimizer, which a framework may have wrapped."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, report: Report) -> None:
        self._optimizer, self._report = optimizer, report
        self._used: Any = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the rate of each step that the optimizer makes meanwhile."""
        self._used = None
        # What a framework puts around an optimizer has no hooks of its own.
        inner: Any = self._optimizer
        while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
            inner = inner.optimizer
        register: Callable[..., Any] | None = getattr(inner, "register_step_pre_hook", None)
        handle = None if register is None else register(Hook(self._note, self._report))
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def _note(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rate = optimizer.param_groups[0]["lr"]
        self._used = rate.detach().clone() if isinstance(rate, torch.Tensor) else rate

    def value(self) -> float | None:
        """Of the last step that was noted; where there is none, as it is now; None without an optimizer."""
        if self._optimizer is None:
            return None
        return float(self._optimizer.param_groups[0]["lr"] if self._used is None else self._used)


def num_updated(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many parameters of a model an optimizer updates."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return sum(id(parameter) in updated for parameter in model.parameters())


def with_optimizer(options: Mapping[str, Any], optimizer: Any, scaler: Any) -> dict[str, Any]:
    """Options of a recorder, with what a framework knows and its user need not give: the optimizer, and its scaler."""
    found: dict[str, Any] = {}
    if optimizer is not None and options.get("metrics") is not None:
        found["optimizer"] = optimizer
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
        found["scaler"] = scaler
    return {**found, **options}


class Sink(Protocol):
    """What `probes.record` calls at the end of each measured step."""

    def __call__(self, step: int, numbers: Mapping[str, float], /) -> Any:
        """Take the finite numbers of a step, by names such as ``amax_gain_fwd/connection_3``."""


class TensorBoardSink:
    """Write to TensorBoard, one event for all numbers of a step.

    Parameters
    ----------
    writer : torch.utils.tensorboard.SummaryWriter
        Where they go.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, step: int, numbers: Mapping[str, float], /) -> None:
        """Write the numbers of one step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        # In one event: a call of `add_scalar` for each of some hundred numbers takes as long as a step of a small model.
        self._writer._get_file_writer().add_summary(Summary(value=values), step)
        self._writer.flush()


class WandbSink:
    """Write to Weights & Biases, online or offline, as the run was made.

    Parameters
    ----------
    run : wandb.sdk.wandb_run.Run
        What ``wandb.init()`` returned.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, step: int, numbers: Mapping[str, float], /) -> None:
        """Write the numbers of one step, without its own count of steps, which the training may use for other numbers."""
        self._run.log({**numbers, "step": step})
