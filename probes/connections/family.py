"""What is a connection family? One declaration of how it is detected, read and frozen; weight files have dialects.

A connection passes n streams X of width D by a branch F with three sets of weights:

    X' = H_res X + H_post ⊗ F(H_pre · X)            (mHC, arXiv 2512.24880, Eq. 3)

Two kinds exist. A *forward* connection is a module whose forward takes X and returns the branch's input with the write
weights, and mostly H_res or the mixed streams; the model itself writes X'. A *paired* connection has one method that opens it
(X in, branch input out) and one that closes it (branch output in, X' out).

A family is detected by the shapes of what its modules take and return. Detection may be wrong: what `read` returns is
believed only because X' is recomputed from it (`depthscope.probes.connections.proof`), and what is frozen only because the
derivative of X' is compared with that of the formula (`depthscope.probes.jacobian.derivative_check`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.connections.coefficients import Parts, as_views
from depthscope.probes.connections.tensor_watch import Watch, WeightPlace

MOST_STREAMS = 64  # heuristic: a larger axis is one of features, not of streams
Seen = Callable[[], list[torch.Tensor]]  # the tensors that the connection computed, the last one first


class StreamConnectionError(InputError):
    """A stream connection that cannot be read."""


class ReconstructionError(StreamConnectionError):
    """The captured parts of a connection do not give the next state."""


@dataclass(frozen=True)
class Site:
    """What one call was detected as: a connection of a family, with the layout of its streams.

    Parameters
    ----------
    style : str
        Name of the `Family` that detected it.
    family : str
        Name of the model's family, one of those that the `Family` declares; a run names an ``"hc"`` by what its matrices are
        measured to satisfy, see `depthscope.probes.connections.constraint`.
    num_streams : int
        n, times the fractions.
    layout : str
        As in `depthscope.probes.model.layout`.
    fractions : int
        Parts of each stream's features that are connected separately.
    branch_shape : tuple of int
        Shape of the branch's output where the model adds it outside of the connection; by it the branch is found.
    mixes : bool
        Whether an H_res exists; otherwise it is the identity.
    reads_features : bool
        Whether the branch input is read by gates per feature, so that no scalar H_pre exists.
    """

    style: str
    family: str
    num_streams: int
    layout: str
    fractions: int = 1
    branch_shape: tuple[int, ...] = ()
    mixes: bool = True
    reads_features: bool = False

    def batch_size(self, x: torch.Tensor) -> int:
        """Number of sequences in streams of this layout."""
        if self.layout.startswith("N B"):
            return x.shape[1]
        # Fractions are parts of the feature axis: only the streams proper are merged with the batch.
        return x.shape[0] // (self.num_streams // self.fractions if self.layout.startswith("(B N)") else 1)


@dataclass(frozen=True)
class Family:
    """What every family declares; take `ForwardFamily` or `PairedFamily`.

    Parameters
    ----------
    name : str
        The style of its connections.
    constrains : mapping of str to str
        The names that it gives to its models, and what the weights of each satisfy by construction (empty for nothing: then it
        is measured).
    """

    name: str
    constrains: Mapping[str, str]


@dataclass(frozen=True)
class ForwardFamily(Family):
    """A family whose connection is the forward of a module.

    Parameters
    ----------
    detect : callable
        ``detect(module, x, output)``: the `Site`, or None where this call is no connection of the family.
    watch : callable
        ``watch(site, x)``: which tensors to keep while the module runs.
    read : callable
        ``read(site, x, output, seen)``: the `Parts` of every token. ``read`` may be None there: then H_pre is looked for
        among the tensors that the module computed.
    """

    detect: Callable[[nn.Module, torch.Tensor, Any], Site | None]
    watch: Callable[[Site, torch.Tensor], Watch]
    read: Callable[[Site, torch.Tensor, Any, Seen], Parts]


def with_branch_output(site: Site, opened: Parts, branch_out: torch.Tensor, output: Any, seen: Any) -> Parts:
    """The parts known at opening, completed by what the branch returned."""
    batch_size, tokens, _, width = opened.branch_in.shape
    views = opened.write.shape[-1]
    return replace(opened, branch_out=as_views(branch_out.detach(), batch_size, tokens, views, width))


@dataclass(frozen=True)
class PairedFamily(Family):
    """A family whose connection is opened and closed by two methods of one module.

    Parameters
    ----------
    opens, closes : str
        Names of the methods.
    branch_argument : int
        Which of the tensors that the closing method takes is the branch's output.
    detect : callable
        ``detect(module, x, batch_size)``: the `Site`, from what the opening method takes; None for a single stream.
    watch : callable
        ``watch(site, x)``: which tensors to keep while the opening method runs.
    read : callable
        ``read(site, batch_size, x, result, seen, place)``: the `Parts` that the opening method shows; ``place`` tells which of
        the tensors were the weights in the forward before, where that is known.
    close : callable
        ``close(site, opened, branch_out, output, seen)``: the final `Parts`.
    watch_closing : callable, optional
        ``watch_closing(site, branch_out)``: which tensors to keep while the closing method runs; not given where that method
        computes no weights.
    rewrites_output : bool
        Whether models of the family write into the next state in place, so that its value must be copied at once.
    """

    opens: str
    closes: str
    branch_argument: int
    detect: Callable[[nn.Module, torch.Tensor, int], Site | None]
    watch: Callable[[Site, torch.Tensor], Watch]
    read: Callable[[Site, int, torch.Tensor, Any, list[torch.Tensor], WeightPlace | None], Parts]
    close: Callable[[Site, Parts, torch.Tensor, Any, list[torch.Tensor]], Parts] = with_branch_output
    watch_closing: Callable[[Site, torch.Tensor], Watch] | None = None
    rewrites_output: bool = False
