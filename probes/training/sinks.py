"""Where else do the numbers of a training go? Sinks: ``sink(step, {name: number})``, for the trackers that people use.

Any function of these two arguments is a sink of `probes.record`. Those below write to an object that the user made with the
tracker's own package, which is imported by them and not by us: ``sinks=[TensorBoardSink(SummaryWriter("runs/a"))]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


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
