"""Stream connections: found by what they take and give, read without formulas, proven by recomputing the next state.

A connection gives three sets of weights for n streams X of width D:

    X' = H_res X + H_post ⊗ F(H_pre · X)            (mHC, arXiv 2512.24880, Eq. 3)

Two styles are met. A *returned* connection is a module that takes X (B T N D) and returns H_post (…, n), mostly a mixing
matrix (…, n, n), and the collapsed branch input (…, D); transformers' ``deepseek_v4`` is one. A *width* connection has the
methods ``width_connection`` and ``depth_connection`` and takes X as ((B N) T D); lucidrains' HC and mHC are such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from probes.hooks import tensors_in
from probes.layout import canonical

# connections compute in float32 inside even where the states are float64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SELECTING_TOKENS = 64  # tokens that tell which of the watched tensors are the weights; the proof looks again


class ConnectionError(ValueError):
    """A stream connection that cannot be read."""


class ReconstructionError(ConnectionError):
    """The captured parts of a connection do not give the next state."""


@dataclass(frozen=True)
class Site:
    """What a module call showed itself to be: a stream connection of a style, with its shapes."""

    style: str
    num_streams: int
    layout: str
    branch_shape: tuple[int, ...]
    mixes: bool
    constrained: bool


@dataclass
class Parts:
    """The weights of one connection call; shapes (B, T, n), (B, T, n, n) and (B, T, D)."""

    mix: torch.Tensor | None
    pre: torch.Tensor | None
    post: torch.Tensor
    branch_in: torch.Tensor

    def at(self, index: torch.Tensor | int) -> Parts:
        """The parts of some sequences."""
        return self._each(lambda tensor: tensor[index])

    def detached(self) -> Parts:
        """Copies in float32 that share nothing with the model's own tensors."""
        return self._each(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Parts:
        return Parts(
            *(None if t is None else change(t) for t in (self.mix, self.pre, self.post, self.branch_in))
        )


def streams_of(module: nn.Module, x: torch.Tensor | None, output: Any) -> Site | None:
    """Tell whether a call was a stream connection, from its input and its outputs.

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
    if x is None:
        return None
    if _is_width_connection(module):
        n = int(module.num_residual_streams)
        return _width_site(module, x, n)
    if isinstance(output, (tuple, list)) and x.ndim >= 3:
        roles = _roles(x, output)
        if "collapsed" in roles and "post" in roles:
            return Site(
                style="returned",
                num_streams=x.shape[-2],
                layout="B T N D" if x.ndim == 4 else "B N D",
                branch_shape=tuple(roles["collapsed"].shape),
                mixes="mix" in roles,
                constrained=_mentions_sinkhorn(module),
            )
        return _gated_site(x, output)
    return None


def _gated_site(x: torch.Tensor, output: Any) -> Site | None:
    """A module that reads a branch input (…, D) and write gates (…, n) from merged streams (…, n·D), as Qwen4-exp's does."""
    lead, width = tuple(x.shape[:-1]), x.shape[-1]
    shapes = {tuple(tensor.shape) for tensor in tensors_in(output) if tensor.is_floating_point()}
    narrow = [
        shape[-1]
        for shape in shapes
        if shape[:-1] == lead and 1 < shape[-1] < width and width % shape[-1] == 0
    ]
    for size in sorted(narrow, reverse=True):  # the width is the larger of the two factors
        n = width // size
        if n != size and (*lead, n) in shapes and x.shape in shapes:
            return Site("gated", n, "B T (N D)", (*lead, size), mixes=False, constrained=False)
    return None


def _is_width_connection(module: nn.Module) -> bool:
    methods = ("width_connection", "depth_connection")
    return all(callable(getattr(module, name, None)) for name in methods) and hasattr(
        module, "num_residual_streams"
    )


def _width_site(module: nn.Module, x: torch.Tensor, n: int) -> Site:
    for name in ("num_fracs", "num_input_views"):
        if getattr(module, name, 1) != 1:
            raise ConnectionError(
                f"{type(module).__name__} has {name}={getattr(module, name)}; only 1 is read so far. "
                "Its mixing matrix is not n × n, so the run is refused rather than read wrongly"
            )
    if getattr(module, "channel_first", False) or x.ndim != 3 or x.shape[0] % n:
        raise ConnectionError(
            f"{type(module).__name__} was called with shape {tuple(x.shape)} for {n} streams; expected ((batch·streams), "
            "token, feature), channels last"
        )
    branch = (x.shape[0] // n, *x.shape[1:])
    return Site("width", n, "(B N) T D", branch, mixes=True, constrained=_mentions_sinkhorn(module))


def _mentions_sinkhorn(module: nn.Module) -> bool:
    """Whether the module itself claims a doubly stochastic mixing matrix."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    functions = [getattr(value, "func", value) for value in own.values()]
    named = [*own, *(getattr(function, "__name__", "") for function in functions if callable(function))]
    return any("sinkhorn" in name.lower() for name in named)


def _roles(x: torch.Tensor, output: Any) -> dict[str, torch.Tensor]:
    lead, (n, width) = tuple(x.shape[:-2]), x.shape[-2:]
    shapes = {"collapsed": (*lead, width), "post": (*lead, n), "mix": (*lead, n, n)}
    roles: dict[str, torch.Tensor] = {}
    for tensor in tensors_in(output):
        for role, shape in shapes.items():
            if role not in roles and tuple(tensor.shape) == shape and tensor.is_floating_point():
                roles[role] = tensor
    return roles if n > 1 and n != width else {}


# --- reading the weights ---


class Watch(TorchFunctionMode):
    """Keep every tensor of some shapes that passes through torch functions while the mode is on.

    Parameters
    ----------
    accept : callable
        ``accept(shape) -> bool``.
    """

    def __init__(self, accept: Any):
        super().__init__()
        self._accept = accept
        self.seen: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and look at what goes in and comes out."""
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, result)):
            if self._accept(tuple(tensor.shape)):
                self.seen[id(tensor)] = tensor
        return result


def read_returned(module: nn.Module, x: torch.Tensor, output: Any, rows: torch.Tensor) -> tuple[Parts, Parts]:
    """Read a returned connection: for the sampled rows all parts, for all tokens what was returned.

    Parameters
    ----------
    module : Module
        The connection.
    x : Tensor
        Its input, (B, T, n, D).
    output : object
        What it returned.
    rows : Tensor
        Indices of the sampled sequences.

    Returns
    -------
    sampled : Parts
        With ``pre`` recovered by watching the module's own computation.
    whole : Parts
        Every token, ``pre`` None.
    """
    roles = _roles(x, output)
    mix, post, collapsed = roles.get("mix"), roles["post"], roles["collapsed"]
    kept = x[rows]
    pre = _watched_pre(module, kept, collapsed[rows]) if len(rows) else None
    sampled = Parts(None if mix is None else mix[rows], pre, post[rows], collapsed[rows])
    return sampled, Parts(mix, None, post, collapsed)


def _watched_pre(module: nn.Module, x: torch.Tensor, collapsed: torch.Tensor) -> torch.Tensor | None:
    lead, n = tuple(x.shape[:-2]), x.shape[-2]
    shapes = {(*lead, n), (*lead, n, 1), (*lead, 1, n)}
    with torch.no_grad(), Watch(shapes.__contains__) as watch:
        module.forward(x)
    candidates = [tensor.reshape(*lead, n) for tensor in watch.seen.values() if tensor.is_floating_point()]
    fits = [(read_error(x, pre, collapsed), pre) for pre in candidates]
    error, best = min(fits, key=lambda fit: fit[0], default=(float("inf"), None))
    return best if error <= tolerance(x.dtype) else least_squares_pre(x, collapsed)


def read_error(x: torch.Tensor, pre: torch.Tensor, branch_in: torch.Tensor) -> float:
    """Relative error of Σ_j pre_j X_j against the branch's input."""
    read = torch.einsum("...n,...nd->...d", pre.double(), x.double())
    return relative_error(read - branch_in.double(), branch_in)


def least_squares_pre(x: torch.Tensor, branch_in: torch.Tensor) -> torch.Tensor:
    """The smallest read weights that give the branch's input; exact where the streams are independent.

    Parameters
    ----------
    x : Tensor
        Streams, (..., n, D).
    branch_in : Tensor
        (..., D).

    Returns
    -------
    Tensor
        (..., n). By pseudo-inverse, since the streams may be copies of one another.
    """
    inverse = torch.linalg.pinv(x.double().mT, rtol=1e-6)
    return (inverse @ branch_in.double().unsqueeze(-1)).squeeze(-1).float()


def read_width(module: Any, x: torch.Tensor, num_streams: int) -> Parts:
    """Read a width connection by watching one more run of its own ``width_connection``.

    Parameters
    ----------
    module : Module
        With ``width_connection(residuals) -> (branch_input, residuals, {"beta": …})``.
    x : Tensor
        Its input, ((B n), T, D).
    num_streams : int
        n.

    Returns
    -------
    Parts
        In which ``mix`` is as the module keeps it, source by destination.

    Raises
    ------
    ConnectionError
        Where no tensor that the module computes explains its output.
    """
    n, width = num_streams, x.shape[-1]
    streams = canonical(x, "(B N) T D", batch_size=x.shape[0] // n, num_streams=n)
    size = streams.shape[0] * streams.shape[1] * n * (n + 1)
    with (
        torch.no_grad(),
        Watch(lambda shape: _count(shape) == size and n in shape and n + 1 in shape) as watch,
    ):
        branch_in, mixed, depth = module.width_connection(x)
    mixed = canonical(mixed, "(B N) T D", batch_size=streams.shape[0], num_streams=n)
    few = spread(streams.shape[0] * streams.shape[1], SELECTING_TOKENS)
    few_in, few_out = streams.flatten(0, 1)[few].double(), mixed.flatten(0, 1)[few].double()
    best, fit = None, float("inf")
    for seen in watch.seen.values():
        alpha = seen.reshape(*streams.shape[:2], n, n + 1)
        explained = alpha.flatten(0, 1)[few][..., 1:].double().mT @ few_in
        error = relative_error(explained - few_out, few_out)
        if error < fit:
            best, fit = alpha, error
    if best is None or fit > tolerance(x.dtype):
        raise ConnectionError(
            f"{type(module).__name__}.width_connection computes no (streams × 1 + streams) weights that explain its "
            f"output (best relative error {fit:.1e}, width {width}); this version of it is not known"
        )
    beta = next(tensors_in(depth)).reshape(*streams.shape[:2], n)
    return Parts(best[..., 1:], best[..., 0], beta, branch_in)


def spread(count: int, most: int) -> torch.Tensor:
    """At most ``most`` indices below ``count``, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def relative_error(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """‖difference‖ / ‖reference‖ in float64; the plain norm where the reference is zero."""
    scale = torch.linalg.vector_norm(reference.detach().double())
    error = torch.linalg.vector_norm(difference.detach().double())
    return float(error / scale) if scale > 0 else float(error)


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a reconstruction counts as proof, by the precision of the states."""
    return TOLERANCE.get(dtype, 1e-4)
