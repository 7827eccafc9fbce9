"""From what were the coefficients of the connections computed, and what became of them? Read in autograd's graph.

One forward runs under a mode that keeps the small tensors and the states that the user's code handles. A coefficient is found
among them by its value, and what it depends on by walking back from its node of the graph to the states and parameters.
Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from depthscope.probes.connections.coefficients import spread
from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.tensors import tensors_in, version

Edge: TypeAlias = tuple[Any, int]  # a node of autograd's graph, and which of its outputs

# Coefficients of float32 that are the same numbers: they were copied, or extracted by a product with zeros and ones.
SAME = 3e-6
COMPARED = 64  # numbers of a state by which it is recognised; a heuristic
EMBEDDING, SIGMOID = "EmbeddingBackward0", "SigmoidBackward0"
UNIFORM = 1e-3  # of every entry from 1/n; a heuristic
CONSTANT = 1e-3  # of a factor, relative; a heuristic


@dataclass(frozen=True)
class Value:
    """A tensor that a function of the user's code returned.

    Parameters
    ----------
    order : int
        Its place in the forward.
    tensor : Tensor
        As returned; its content may have been rewritten since, see ``rewritten``.
    edge : tuple or None
        What computed it, in autograd's graph; None where it carries no gradient.
    cut : bool
        Whether an argument carried a gradient though this does not.
    written : int or None
        torch's count of writes at that time.
    """

    order: int
    tensor: torch.Tensor
    edge: Edge | None
    cut: bool
    written: int | None

    @property
    def rewritten(self) -> bool:
        """Whether it was written in place since."""
        return self.written != version(self.tensor)


class Computation(TorchFunctionMode):
    """Keep the tensors of some numbers of elements that the user's code computes in one forward.

    Parameters
    ----------
    sizes : set of int
        Numbers of elements.
    """

    def __init__(self, sizes: set[int]):
        super().__init__()
        self._sizes = sizes
        self.values: list[Value] = []
        self._count = 0
        self.error: Exception | None = None  # why no more is kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and look at what comes out."""
        result = func(*args, **(kwargs or {}))
        if self.error is None:
            try:
                with torch._C.DisableTorchFunction():
                    self._keep(args, result)
            except (Exception, GeneratorExit) as error:  # the user's function has run, whatever we met
                self.error, self.values = without_frames(error), []
        return result

    def _keep(self, args: Any, result: Any) -> None:
        self._count += 1
        given = list(tensors_in(args))
        # A parameter may be applied as it stands: then no function has returned it.
        wanted = [each for each in given if each.is_leaf and each.requires_grad]
        wanted += tensors_in(result)
        for tensor in wanted:
            if tensor.is_floating_point() and tensor.numel() in self._sizes:
                cut = not tensor.requires_grad and any(each.requires_grad for each in given)
                edge = tuple(get_gradient_edge(tensor)[:2]) if tensor.requires_grad else None
                self.values.append(Value(self._count, tensor, edge, cut, version(tensor)))


def ancestors(edges: Iterable[Edge | None], stop: frozenset[Edge] = frozenset()) -> set[Edge]:
    """What some values were computed from, themselves included; the walk goes no further than ``stop``."""
    # The nodes themselves are stored, not their ids: Python's object of a node is made anew where none is alive.
    seen = {edge for edge in edges if edge is not None}
    waiting = [edge for edge in seen if edge not in stop]
    walked = set()
    while waiting:
        node, _ = waiting.pop()
        if node in walked:
            continue
        walked.add(node)
        for following in node.next_functions:
            if following[0] is not None and following not in seen:
                seen.add(following)
                if following not in stop:
                    waiting.append(following)
    return seen


@dataclass
class Forward:
    """What one forward computed, with the graph of its outputs.

    Parameters
    ----------
    values : sequence of Value
        In order.
    outputs : list of Tensor
        What the model returned and carries a gradient.
    batch_size, tokens : int
        B and T.
    canonical : callable
        A state of the model's own layout as (B, T, N, D).
    shape : tuple of int
        Of a state in the model's own layout.
    rows : list of int
        The sequences of this batch that were sampled.
    """

    values: Sequence[Value]
    outputs: list[torch.Tensor]
    batch_size: int
    tokens: int
    canonical: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    rows: list[int]
    _states: list[tuple[Value, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        current = [v for v in self.values if tuple(v.tensor.shape) == self.shape and not v.rewritten]
        self._states = [(value, self._few(self.canonical(value.tensor.detach())[self.rows])) for value in current]

    @cached_property
    def alive(self) -> set[Edge]:
        """What the outputs were computed from."""
        return ancestors((output.grad_fn, output.output_nr) for output in self.outputs if output.grad_fn is not None)

    @staticmethod
    def _few(state: torch.Tensor) -> torch.Tensor:
        flat = state.flatten()
        return flat[spread(len(flat), COMPARED).to(flat.device)].double()

    def states(self, x: torch.Tensor) -> list[Value]:
        """Every value that is this state, (K, T, N, D) of the sampled sequences."""
        wanted = self._few(x)
        scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return [value for value, few in self._states if (few.to(wanted.device) - wanted).abs().max() <= SAME * scale]

    def per_token(self, tensor: torch.Tensor, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A tensor as (B, T, *tail) in the ways that its shape allows; a constant one is expanded."""
        lead, size, shape = (self.batch_size, self.tokens), math.prod(tail), tuple(tensor.shape)
        if tensor.numel() == size:
            yield tensor.reshape(tail).expand(*lead, *tail)
        elif tensor.numel() == math.prod(lead) * size:
            if shape[0] in (lead[0], math.prod(lead)):
                yield tensor.reshape(*lead, *tail)
            if shape[:2] == lead[::-1]:
                yield tensor.reshape(*lead[::-1], *tail).transpose(0, 1)
            if shape == (*tail, *lead):
                yield tensor.movedim((-2, -1), (0, 1))

    def matching(self, wanted: torch.Tensor, between: tuple[int, int]) -> list[Value]:
        """The values that are these coefficients (K, T, *tail), or their transpose; the last one first.

        A matrix may be a part of one that reads too: its last columns, source by destination.

        Parameters
        ----------
        wanted : Tensor
            Coefficients of the sampled sequences, on the CPU.
        between : tuple of int
            The values of which part of the forward are looked at, see `Value.order`.

        Returns
        -------
        list of Value
        """
        limit = SAME * max(1.0, float(wanted.abs().max()))
        return [
            value
            for value in reversed(self.within(between))
            if any(self._equal(each, wanted, limit) for each in self._readings(value, tuple(wanted.shape[2:])))
        ]

    def within(self, between: tuple[int, int]) -> Sequence[Value]:
        """The values of a part of the forward that are what they were."""
        first, last = (bisect_left(self.values, order, key=lambda value: value.order) for order in between)
        return [value for value in self.values[first:last] if not value.rewritten]

    def _readings(self, value: Value, tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        tensor, matrix = value.tensor.detach(), len(tail) == 2
        for each in self.per_token(tensor, tail):
            yield from (each, each.mT) if matrix else (each,)
        for views in (1, 2) if matrix else ():
            for each in self.per_token(tensor, (tail[0], tail[0] + views)):
                yield from (each[..., views:], each[..., views:].mT)

    def _equal(self, tensor: torch.Tensor, wanted: torch.Tensor, limit: float) -> bool:
        few = tensor[self.rows].to(wanted.device, torch.float32)
        # A few tokens first: most candidates differ everywhere.
        near = (few[:, :1] - wanted[:, :1]).abs().max() <= limit
        return bool(near and (few - wanted).abs().max() <= limit)


@dataclass(frozen=True)
class Origin:
    """From what the coefficients of one connection were computed.

    Parameters
    ----------
    found : bool
        Whether the states and the matrix of the connection were found among the values; without them nothing is known.
    severed : bool
        Whether the matrix was computed from what carries a gradient, and carries none.
    other_states : mapping of str to tuple of int
        By weights (H_res, H_pre, H_post): at which connections the states are that they were computed from though they are
        not this connection's own; −1 for the token's embedding.
    other_tokens : float
        The share of the gradient of one token's coefficients that falls on the states of other tokens.
    later : bool
        Whether some of these tokens come later in the sequence.
    unused : Tensor or None
        A matrix (K, T, n, n) that was computed for this connection, from parameters, and reaches no output.
    sigmoids : mapping of str to float
        By weights (H_pre, H_post): the factor c where they are c · σ(·).
    gradients : tuple of float, optional
        Where the matrix is uniform: the largest gradient of its logits and of the write weights, for a random combination of
        the model's outputs.
    """

    found: bool
    severed: bool = False
    other_states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    other_tokens: float = 0.0
    later: bool = False
    unused: torch.Tensor | None = None
    sigmoids: Mapping[str, float] = field(default_factory=dict)
    gradients: tuple[float, float] | None = None


@dataclass(frozen=True)
class Applied:
    """The coefficients that one connection applies, of the sampled sequences of one batch (K, T, …)."""

    x_in: torch.Tensor
    x_out: torch.Tensor
    mix: torch.Tensor
    read: torch.Tensor | None
    write: torch.Tensor | None


def trace_origins(forward: Forward, applied: Sequence[Applied]) -> list[Origin]:
    """From what the coefficients of every connection were computed.

    Parameters
    ----------
    forward : Forward
        What one forward computed.
    applied : sequence of Applied
        One for each connection, in order.

    Returns
    -------
    list of Origin
    """
    states = [forward.states(each.x_in) for each in applied]
    nodes = [frozenset(value.edge for value in found if value.edge is not None) for found in states]
    origins, learning = [], dict[int, tuple[torch.Tensor, torch.Tensor]]()
    for number in range(len(applied)):
        origin, weights = _origin(forward, applied, states, nodes, number)
        origins.append(origin)
        logits = _logits(forward, weights.get("H_res", []), applied[number].mix, frozenset[Edge]().union(*nodes))
        if logits is not None and weights.get("H_post"):
            learning[number] = logits, weights["H_post"][0].tensor
    # One backward for all of them, and none where no matrix is uniform: others learn from any difference of the streams.
    gradients = gradients_of(forward, [tensor for pair in learning.values() for tensor in pair]) if learning else []
    sizes = [0.0 if gradient is None else float(gradient.abs().max()) for gradient in gradients]
    for number, pair in zip(learning, zip(sizes[::2], sizes[1::2], strict=True), strict=True):
        origins[number] = replace(origins[number], gradients=pair)
    return origins


def _logits(
    forward: Forward, mix: list[Value], matrix: torch.Tensor, states: frozenset[Edge]
) -> torch.Tensor | None:
    """What a uniform matrix was made of: the first value of its size among those that it was computed from."""
    n = matrix.shape[-1]
    if not mix or mix[0].edge is None or float((matrix - 1 / n).abs().max()) > UNIFORM:
        return None
    behind = ancestors([mix[0].edge], stop=states)
    sizes = (n * n, forward.batch_size * forward.tokens * n * n)
    first = (v for v in forward.values if v.edge in behind and v.tensor.numel() in sizes and not v.rewritten)
    return next((value.tensor for value in first), None)


def _origin(
    forward: Forward,
    applied: Sequence[Applied],
    states: Sequence[list[Value]],
    nodes: Sequence[frozenset[Edge]],
    number: int,
) -> tuple[Origin, dict[str, list[Value]]]:
    own, after = states[number], forward.states(applied[number].x_out)
    if not own or not after or not nodes[number]:
        return Origin(found=False), {}
    end = after[0].order
    # Weights may have been computed before this connection began, from an earlier state: what is nearest to it counts.
    windows = [(own[0].order, end), (states[max(0, number - 2)][0].order if states[max(0, number - 2)] else 0, end), (0, end)]
    weights = {"H_res": applied[number].mix, "H_pre": applied[number].read, "H_post": applied[number].write}
    found = {name: _first_match(forward, w, windows) for name, w in weights.items() if w is not None}
    mix = found.get("H_res", [])
    unused = _unused_matrix(forward, (own[0].order, end), applied[number].mix)
    if not mix:
        return Origin(found=False, unused=unused), {}
    reached = {name: _touched(forward, values, nodes, number) for name, values in found.items() if values}
    share, later = _other_tokens(forward, own[0], [values[0] for values in found.values() if values])
    origin = Origin(
        found=True,
        severed=_severed(forward, mix, after[0], (own[0].order, end)),
        other_states={name: at for name, at in reached.items() if at},
        other_tokens=share,
        later=later,
        unused=unused,
        sigmoids={
            name: factor
            for name in ("H_pre", "H_post")
            if weights[name] is not None and (factor := _sigmoid_factor(forward, weights[name], windows)) is not None
        },
    )
    return origin, found


def _sigmoid_factor(forward: Forward, wanted: torch.Tensor, windows: list[tuple[int, int]]) -> float | None:
    """The factor c of weights (K, T, n) that are c · σ(·), up to a small constant; None where they are not."""
    for value in forward.within(windows[0]):
        if value.edge is None or value.edge[0].name() != SIGMOID:
            continue
        for each in forward.per_token(value.tensor.detach(), tuple(wanted.shape[2:])):
            ratio = wanted / each[forward.rows].to(wanted.device, torch.float32)
            # Some add 1e-6 to the sigmoid, as DeepSeek's.
            if float(ratio.max() - ratio.min()) <= CONSTANT * float(ratio.mean()):
                return float(ratio.mean())
    return None


def _first_match(forward: Forward, wanted: torch.Tensor, windows: list[tuple[int, int]]) -> list[Value]:
    for window in windows:
        values = forward.matching(wanted, window)
        if values:
            return values
    return []


def _severed(forward: Forward, mix: list[Value], after: Value, window: tuple[int, int]) -> bool:
    """Whether H_res carries no gradient to the outputs though it, or what it was made of, could."""
    # Under `no_grad` as a whole, as within reentrant checkpointing, the next state carries none either.
    if after.edge is None or any(value.edge in forward.alive for value in mix if value.edge is not None):
        return False
    return any(value.edge is not None or value.cut for value in mix) or any(
        value.cut and value.tensor.numel() == mix[0].tensor.numel() for value in forward.within(window)
    )


def _touched(
    forward: Forward, values: list[Value], nodes: Sequence[frozenset[Edge]], number: int
) -> tuple[int, ...]:
    """The connections whose states some coefficients were computed from, other than by way of their own state."""
    every = frozenset[Edge]().union(*nodes)
    starts = [value.edge for value in values if value.edge is not None][:1]
    reached = ancestors(starts, stop=every)
    if nodes[number] & set(starts):
        return ()
    others = [at for at, of in enumerate(nodes) if at != number and reached & of and not of & nodes[number]]
    if not others and number and not reached & nodes[number] and any(node.name() == EMBEDDING for node, _ in reached):
        return (-1,)
    return tuple(others)


def _other_tokens(forward: Forward, state: Value, values: list[Value]) -> tuple[float, bool]:
    """The share of the gradient of one token's coefficients at other tokens' states; whether some of these come later."""
    terms, token = [], forward.tokens // 2
    generator = torch.Generator().manual_seed(0)
    for value in values:
        size = value.tensor.numel() // (forward.batch_size * forward.tokens)
        carries = value.tensor.requires_grad and value.edge is not None
        one = next(forward.per_token(value.tensor, (size,)), None) if size and carries else None
        if one is not None and value.tensor.numel() == forward.batch_size * forward.tokens * size:
            picked = one[0, token]
            terms.append((picked.float() * torch.randn(size, generator=generator).to(picked.device)).sum())
    if not terms or not state.tensor.requires_grad:
        return 0.0, False
    (gradient,) = torch.autograd.grad(sum(terms), state.tensor, retain_graph=True, allow_unused=True)
    if gradient is None:
        return 0.0, False
    sizes = forward.canonical(gradient).float().flatten(2).norm(dim=-1)  # (B, T)
    total = float(sizes.sum())
    own = float(sizes[0, token])
    later = bool((sizes[0, token + 1 :] > SAME * sizes.max()).any())
    return (max(0.0, 1.0 - own / total) if total > 0 else 0.0), later


def _unused_matrix(forward: Forward, window: tuple[int, int], mix: torch.Tensor) -> torch.Tensor | None:
    """A matrix (K, T, n, n) that was computed from parameters within a connection, and that no output depends on."""
    n = mix.shape[-1]
    square = [v for v in forward.within(window) if next(forward.per_token(v.tensor.detach(), (n, n)), None) is not None]
    dead = [value for value in square if value.edge is not None and value.edge not in forward.alive]
    if not dead:
        return None
    last = dead[-1]
    behind = ancestors([last.edge])
    # A statistic of a matrix that is applied, as its entropy for a log, is computed from one that is alive.
    if any(value.edge in behind for value in square if value.edge in forward.alive):
        return None
    matrix = next(forward.per_token(last.tensor.detach(), (n, n)))[forward.rows].to(mix.device, torch.float32)
    limit = SAME * max(1.0, float(mix.abs().max()))
    same = min(float((matrix - mix).abs().max()), float((matrix.mT - mix).abs().max())) <= limit
    return None if same else matrix


def gradients_of(forward: Forward, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients of a random combination of the model's outputs: zero where no output depends on a tensor, whatever the loss."""
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        for output in forward.outputs
    )
    return list(torch.autograd.grad(total, list(tensors), retain_graph=True, allow_unused=True))  # type: ignore[arg-type]
