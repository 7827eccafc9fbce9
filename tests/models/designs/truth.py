"""What is true of a design? Its own code writes it down while it runs; nothing of the probes is used for it.

A model calls `state` where a residual state is made and `connection` between two of them. Nobody listens unless `written`
does, so that a capture sees the model's own operations alone.

Shapes: B sequences, T tokens, n streams, D features. Matrices are destination × source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import nn

SEED = 11  # of what a forward draws itself, such as the blocks that LayerDrop leaves out


@dataclass(frozen=True)
class State:
    """One residual state: ``value`` is (B, T, n, D); ``sites`` are the labels that are true of it.

    Of the states with one ``need`` a capture must show at least one; those without any may be left out.
    """

    layer: int
    sites: tuple[str, ...]
    value: torch.Tensor
    need: str


@dataclass(frozen=True)
class Connection:
    """What joins two states, by their numbers in the chain: ``parts`` are the variables of a run, as (B, T, …)."""

    state_in: int
    state_out: int
    parts: dict[str, torch.Tensor]


@dataclass
class Chain:
    """States in depth order, and what joins them."""

    states: list[State] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    pending: dict[str, torch.Tensor] | None = None


Truth = dict[str, Chain]
_listening: list[Truth] = []


def written(model: nn.Module, batch: Any) -> Truth:
    """Run the model once, and return what its code wrote down."""
    truth: Truth = {}
    _listening.append(truth)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED)
            called(model, batch)
    finally:
        _listening.pop()
    return truth


def called(model: nn.Module, batch: Any) -> Any:
    """The model's output: a mapping is passed as keywords, a tuple as positional arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def on() -> bool:
    """Whether anybody listens: for models that must compute what they write down."""
    return bool(_listening)


def state(
    x: torch.Tensor,
    layer: int,
    sites: str = "post",
    *,
    axes: str = "b t d -> b t 1 d",
    chain: str = "",
    need: str | None = None,
    **sizes: int,
) -> None:
    """Write down a state.

    Parameters
    ----------
    x : Tensor
        In the model's own layout, which ``axes`` and ``sizes`` bring to (B, T, n, D).
    layer, sites : int, str
        The block's number, -1 before the first; and the site, or several that are true alike, as in ``"post|pre"``.
    chain : str
        Its name where there are several.
    need : str, optional
        See `State`; by default every state is needed but those inside of a block and those changed between blocks.
    """
    if not _listening:
        return
    of = _listening[-1].setdefault(chain, Chain())
    value = rearrange(x.detach().clone().float(), axes, **sizes)
    names = tuple(sites.split("|"))
    default = "" if {"mid", "pre"} & set(names) else f"layer {layer}"
    of.states.append(State(layer, names, value, default if need is None else need))
    if of.pending is not None:
        number = len(of.states) - 1
        of.connections.append(Connection(number - 1, number, of.pending))
        of.pending = None


def connection(*, chain: str = "", **parts: Any) -> None:
    """Write down what joins the last state to the next one.

    ``parts`` are numbers or tensors that end on the axes of the run's variable: (n, n) of ``h_res``, (n) of ``h_pre`` and
    ``h_post``, (D) of ``branch_in``, ``branch_out`` and gates, none of scales, (sources) of depth reads; before these axes
    they have (B, T) or nothing.
    """
    if not _listening:
        return
    of = _listening[-1].setdefault(chain, Chain())
    batch, tokens, streams, width = of.states[-1].value.shape
    of.pending = {}
    for name, value in parts.items():
        tensor = torch.as_tensor(value).detach().clone().float()
        own = OWN_AXES[name]
        lead = tensor.shape[: tensor.ndim - own]
        full = (batch, tokens) if not lead else torch.broadcast_shapes(lead, (batch, tokens))
        of.pending[name] = tensor.expand(*full, *tensor.shape[tensor.ndim - own :])


# How many axes each variable has after (B, T).
OWN_AXES = {
    "h_res": 2, "h_pre": 1, "h_post": 1, "branch_in": 1, "branch_out": 1, "residual_scale": 0, "branch_scale": 0,
    "residual_gate": 1, "branch_gate": 1, "depth_read": 1, "depth_carry": 1, "read": 2, "write": 2,
}  # fmt: skip
