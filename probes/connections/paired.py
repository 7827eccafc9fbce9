"""Paired connections: what their two methods are given and give, read as parts of a connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.altup import altup_watch, read_altup, read_correction
from depthscope.probes.connections.coefficients import Parts, as_views
from depthscope.probes.connections.detection import Site, pair_of
from depthscope.probes.connections.tensor_watch import Watch
from depthscope.probes.connections.width import read_width, width_watch
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.tensors import tensors_in


@dataclass
class Opening:
    """A connection that was opened and not closed yet.

    Parameters
    ----------
    site : Site
        What it is.
    batch_size : int
        Size of the batch.
    x : Tensor
        The streams that it was given.
    """

    site: Site
    batch_size: int
    x: torch.Tensor
    key: Any = None  # whose opening it is, for the one who keeps it
    parts: Parts | None = None
    matrix: torch.Tensor | None = None
    predicted: torch.Tensor | None = None

    def watch(self) -> Watch:
        """What to watch for while the opening method runs."""
        return altup_watch(self.x) if self.site.style == "altup" else width_watch(self.x, self.site)

    def read(self, result: Any, watch: Watch) -> None:
        """Read what the opening method gave."""
        if self.site.style == "altup":
            self.matrix = read_altup(self.x, result, watch.floating())
            self.predicted = result.detach()
        else:
            self.parts = read_width(self.site, self.batch_size, self.x, result, watch.floating())

    def closing_watch(self, branch_out: torch.Tensor) -> Watch | None:
        """What to watch for while the closing method runs; None where opening told all."""
        return altup_watch(branch_out) if self.site.style == "altup" else None

    def close(self, branch_out: torch.Tensor, output: Any, watch: Watch | None) -> Parts:
        """The parts, when the closing method has given the next state.

        Parameters
        ----------
        branch_out : Tensor
            What the branch gave.
        output : object
            What the closing method gave.
        watch : Watch or None
            What passed while it ran, of `closing_watch`.

        Returns
        -------
        Parts
        """
        if watch is not None and self.matrix is not None and self.predicted is not None:
            closed = next(tensors_in(output))
            return read_correction(self.matrix, self.predicted, branch_out, closed, watch.floating())
        assert self.parts is not None
        tokens, _, width = self.parts.branch_in.shape[1:]
        views = self.parts.write.shape[-1]
        self.parts.branch_out = as_views(branch_out, self.batch_size, tokens, views, width)
        return self.parts


def branch_output(module: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    """What the branch gave, among what the closing method of a connection takes.

    Parameters
    ----------
    module : Module
        A paired connection.
    args, kwargs
        What its closing method was given.

    Returns
    -------
    Tensor

    Raises
    ------
    CaptureError
        Where no tensor is there.
    """
    pair = pair_of(module)
    floating = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.ndim >= 2]
    if pair is None or len(floating) <= pair.branch_argument:
        raise CaptureError(f"{type(module).__name__} closed a connection without its branch's output")
    return floating[pair.branch_argument].detach()
