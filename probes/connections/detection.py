"""Stream connections: found by what they take and give, never by class names.

A connection gives three sets of weights for n streams X of width D:

    X' = H_res X + H_post ⊗ F(H_pre · X)            (mHC, arXiv 2512.24880, Eq. 3)

Two kinds are met. A *returned* connection is a module that takes X and returns the branch's input (…, D) with the write
weights H_post (…, n), mostly with a mixing matrix (…, n, n) or the mixed streams; transformers' ``deepseek_v4`` is one. A
*paired* connection has one method that opens it (X in, branch input out) and one that closes it (branch output in, X' out):
lucidrains' ``width_connection`` and ``depth_connection``, and AltUp's ``predict`` and ``correct``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.tensors import tensors_in

MOST_STREAMS = 64
SPAN_TOKENS = 64  # tokens that tell where the streams lie, when the shapes do not
STREAM_AXES = {"B T N D": 2, "B N D": 1, "B N T D": 1, "N B T D": 0}


class ConnectionError(ValueError):
    """A stream connection that cannot be read."""


class ReconstructionError(ConnectionError):
    """The captured parts of a connection do not give the next state."""


@dataclass(frozen=True)
class Site:
    """What a call showed itself to be: a stream connection of a style, with its shapes."""

    style: str  # "returned", "width" or "altup"
    num_streams: int  # fractions included
    layout: str
    fractions: int = 1
    branch_shape: tuple[int, ...] = ()
    mixes: bool = True
    constrained: bool = False
    reads_features: bool = False  # read by gates per feature, so that no scalar H_pre exists

    @property
    def family(self) -> str:
        """The family that one connection of this kind belongs to."""
        if self.style == "altup":
            return "altup"
        if not self.mixes:
            return "gated" if self.reads_features else "independent_hc"
        return "mhc" if self.constrained else "hc"


@dataclass(frozen=True)
class Pair:
    """The two methods of a paired connection."""

    opens: str
    closes: str
    style: str
    branch_argument: int  # which tensor that the closing method takes is the branch's output


PAIRS = (Pair("width_connection", "depth_connection", "width", 0), Pair("predict", "correct", "altup", 1))


def pair_of(module: nn.Module) -> Pair | None:
    """The methods by which a module opens and closes a connection, or None.

    Parameters
    ----------
    module : Module
        Any module.

    Returns
    -------
    Pair or None
    """
    for pair in PAIRS:
        if callable(getattr(module, pair.opens, None)) and callable(getattr(module, pair.closes, None)):
            return pair
    return None


def opened_site(pair: Pair, module: Any, x: torch.Tensor, batch_size: int) -> Site | None:
    """What the opening call of a pair shows of its streams.

    Parameters
    ----------
    pair : Pair
        Of `pair_of`.
    module : Module
        The connection.
    x : Tensor
        What the opening method was given.
    batch_size : int
        Size of the model's batch.

    Returns
    -------
    Site or None
        None where the module keeps a single stream.

    Raises
    ------
    ConnectionError
        Where the shape fits no way of keeping streams.
    """
    if pair.style == "altup":
        if x.ndim == 4 and x.shape[1] == batch_size:
            return Site("altup", x.shape[0], "N B T D")
        return None
    n = int(getattr(module, "num_residual_streams", 1))
    fractions = int(getattr(module, "num_fracs", 1))
    if n * fractions == 1:
        return None
    layout = _width_layout(module, x, n, batch_size)
    if fractions > 1:
        layout = layout.replace("D", "(F D)")
    return Site("width", n * fractions, layout, fractions, constrained=mentions_sinkhorn(module))


def _width_layout(module: nn.Module, x: torch.Tensor, n: int, batch_size: int) -> str:
    tokens = {2: "", 3: "T ", 4: "H W ", 5: ""}.get(x.ndim, "")
    if x.shape[0] == n * batch_size and x.ndim in (2, 3, 4):
        first = getattr(module, "channel_first", False) or any(
            isinstance(child, nn.Conv2d) for child in module.children()
        )
        return f"(B N) D {tokens}".rstrip() if first and tokens else f"(B N) {tokens}D"
    if x.ndim >= 3 and x.shape[0] == batch_size and x.shape[-2] == n:
        return {3: "B N D", 4: "B T N D", 5: "B H W N D"}[x.ndim]
    raise ConnectionError(
        f"{type(module).__name__} was called with shape {tuple(x.shape)} for {n} streams and a batch of {batch_size}; "
        "expected ((batch·streams), token, feature) or (batch, token, stream, feature)"
    )


def returned_site(module: nn.Module, x: torch.Tensor | None, output: Any) -> Site | None:
    """Tell whether a module's call was a stream connection, from its input and its outputs.

    Parameters
    ----------
    module : Module
        The called module.
    x : Tensor or None
        Its first floating input.
    output : object
        What it returned.

    Returns
    -------
    Site or None
    """
    if x is None or x.ndim < 3 or not isinstance(output, (tuple, list, dict)) or pair_of(module) is not None:
        return None
    roles = find_roles(x, output)
    return None if roles is None else roles.site(module, x)


@dataclass(frozen=True)
class Roles:
    """The outputs of a returned connection by their roles; lead is (B, T) without the stream axis."""

    layout: str
    lead: tuple[int, ...]
    num_streams: int
    width: int
    collapsed: torch.Tensor | None
    vectors: tuple[torch.Tensor, ...]
    mix: torch.Tensor | None
    mixed: torch.Tensor | None

    def site(self, module: nn.Module, x: torch.Tensor) -> Site:
        """The site that these roles show, with the streams that the module was given."""
        handed_on = self.mixed is not None and torch.equal(self.mixed.detach(), x.detach())
        return Site(
            "returned",
            self.num_streams,
            self.layout,
            branch_shape=(*self.lead, self.width),
            mixes=self.mix is not None or (self.mixed is not None and not handed_on),
            constrained=mentions_sinkhorn(module),
            reads_features=self.layout.endswith("(N D)"),
        )


def find_roles(x: torch.Tensor, output: Any) -> Roles | None:
    """Sort the outputs of a module by the roles that a connection's outputs have.

    Parameters
    ----------
    x : Tensor
        The module's input.
    output : object
        What it returned.

    Returns
    -------
    Roles or None
        None where these are not the outputs of a connection.
    """
    found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    matches = [_stream_axis_roles(x, found, layout, axis) for layout, axis in STREAM_AXES.items()]
    roles = [match for match in matches if match is not None]
    if len(roles) > 1:  # as many tokens or sequences as streams: the shapes do not tell which axis is which
        return min(roles, key=lambda match: _distance_to_span(x, match))
    return roles[0] if roles else _merged_roles(x, found)


def _distance_to_span(x: torch.Tensor, roles: Roles) -> float:
    """How far the branch's input lies from the span of the streams, if the streams lie as these roles say."""
    if roles.collapsed is None:
        return 0.0
    streams = x.detach().movedim(STREAM_AXES[roles.layout], -2).flatten(0, -3)[:SPAN_TOKENS].double()
    goal = roles.collapsed.detach().flatten(0, -2)[:SPAN_TOKENS].double().unsqueeze(-1)
    read = torch.linalg.pinv(streams.mT) @ goal
    return float((streams.mT @ read - goal).norm() / goal.norm().clamp_min(torch.finfo(goal.dtype).tiny))


def _stream_axis_roles(x: torch.Tensor, found: list[torch.Tensor], layout: str, axis: int) -> Roles | None:
    if x.ndim != len(layout.split()):
        return None
    n, width = x.shape[axis], x.shape[-1]
    lead = tuple(size for position, size in enumerate(x.shape[:-1]) if position != axis)
    if not 1 < n <= MOST_STREAMS or n == width:
        return None
    collapsed = [t for t in found if tuple(t.shape) == (*lead, width)]
    mixed = [t for t in found if t.shape == x.shape]
    vectors = [t for t in found if fits(t, lead, (n,), (n, 1), (1, n)) and tuple(t.shape) != (*lead, n, n)]
    mixes = [t for t in found if fits(t, lead, (n, n)) and tuple(t.shape) != (*lead, n)]
    enough = vectors and (collapsed or mixes) and (x.ndim > 3 or mixes)
    if not enough or (not collapsed and len(vectors) < 2):
        return None
    return Roles(
        layout,
        lead,
        n,
        width,
        _first(collapsed),
        tuple(vectors),
        _first(mixes),
        None if mixes else _first(mixed),
    )


def _merged_roles(x: torch.Tensor, found: list[torch.Tensor]) -> Roles | None:
    """A branch input (…, D) and write gates (…, n) from streams merged into one axis of n·D, as Qwen4-exp's does."""
    lead, width = tuple(x.shape[:-1]), x.shape[-1]
    narrow = {t.shape[-1] for t in found if tuple(t.shape[:-1]) == lead and 1 < t.shape[-1] < width}
    for size in sorted(narrow, reverse=True):  # the width is the larger of the two factors
        n, rest = divmod(width, size)
        vectors = tuple(t for t in found if tuple(t.shape) == (*lead, n))
        mixed = [t for t in found if t.shape == x.shape]
        if not rest and n != size and vectors and mixed:
            collapsed = next(t for t in found if tuple(t.shape) == (*lead, size))
            return Roles("B T (N D)", lead, n, size, collapsed, vectors, None, mixed[0])
    return None


def fits(tensor: torch.Tensor, lead: tuple[int, ...], *tails: tuple[int, ...]) -> bool:
    """Whether a tensor is one weight per token, or one static weight for all of them.

    Parameters
    ----------
    tensor : Tensor
        A candidate.
    lead : tuple of int
        (B, T).
    tails : tuple of int
        The shapes that one token's weight may have.

    Returns
    -------
    bool
    """
    shape = tuple(tensor.shape)
    return any(
        shape == (*lead, *tail) or (shape[-len(tail) :] == tail and set(shape[: -len(tail)]) <= {1})
        for tail in tails
    )


def _first(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return tensors[0] if tensors else None


def mentions_sinkhorn(module: nn.Module) -> bool:
    """Whether the module itself claims a doubly stochastic mixing matrix."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    functions = [getattr(value, "func", value) for value in own.values()]
    named = [*own, *(getattr(function, "__name__", "") for function in functions if callable(function))]
    return any("sinkhorn" in name.lower() for name in named)


def past_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor | None
) -> list[torch.Tensor] | None:
    """The list of earlier states that a depth-history connection is given beside the branch's output, or None.

    Parameters
    ----------
    args, kwargs
        What a module was called with.
    x : Tensor or None
        Its first floating input.

    Returns
    -------
    list of Tensor or None
        Oldest first.
    """
    if x is None or not args or args[0] is not x:
        return None
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, (list, tuple)) and value and all(_like(x, item) for item in value):
            return list(value)
    return None


def _like(x: torch.Tensor, item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.shape == x.shape and item.is_floating_point()
