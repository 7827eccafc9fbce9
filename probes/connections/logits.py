"""What are the logits of a mixing matrix? The tensor whose exponential, scaled by rows and by columns, is H_res.

Softmax and any number of rounds of Sinkhorn multiply the rows and columns of exp(H̃) by factors:

    H_res = diag(a) exp(H̃) diag(b),      so that      log H_res − H̃ = log a 1ᵀ + 1 (log b)ᵀ

That equation tells H̃ from other tensors whatever code projects it, and in which orientation. Where the logits come from is
told by autograd's graph: all of H_res's gradient passes through them. A tensor for which either fails is not taken.
Shapes: B batch, T token, n streams; m some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from depthscope.probes.connections.coefficients import per_token, spread
from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.tensors import tensors_in, version

# torch's names of functions that take logits; of a stable softmax written by hand, of its exponential.
EXPONENTIALS = frozenset(("exp", "softmax", "log_softmax", "logsumexp"))
# What models add to their entries and sums so that they divide by no zero, about 1e-6, over the smallest sum that it may have
# been divided by since: it moves the logarithm of small entries. Heuristic.
ADDED = 1e-4
# Coefficients of float32 that are the same numbers: they were copied, or extracted by a product with zeros and ones.
SAME = 3e-6
CLOSE = 1e-3  # of logarithms, where nothing was added; a heuristic
COMPARED_TOKENS = 64  # a wrong tensor, or the wrong orientation, differs at nearly every token
# Shares of tokens at which the equation holds. Of what an exponential takes, and all of H_res's gradient passes through, it
# decides the orientation alone: saturated logits of DeepSeek-V4 reach 0.5, the wrong orientation 0. Of other tensors, such as
# logits before a temperature, it is all that there is. Heuristics.
ENOUGH, NEARLY_ALL = 0.1, 0.9
MOST_OPERATIONS = 20_000  # between logits and matrix: 20 rounds of Sinkhorn are about 100

NOT_POSITIVE = "H_res has entries that are not positive: it is no scaled exponential of logits"
NO_GRAPH = "the forward kept no graph, in which logits are recognised"
NOT_FOUND = (
    "no tensor whose exponential was taken gives H_res by scaling its rows and columns, and nothing else"
)
NOT_SEEN = "the matrix itself is no tensor that the module's own code handles"


def exponential_argument(name: str, args: Any) -> torch.Tensor | None:
    """The tensor whose exponential a function of torch takes; None where it takes none."""
    if name not in EXPONENTIALS or not args or not isinstance(args[0], torch.Tensor):
        return None
    return args[0] if args[0].is_floating_point() else None


def passes_through(result: torch.Tensor, source: torch.Tensor) -> bool | None:
    """Whether all of a tensor's gradient passes through another one.

    Returns: False where some of it does, and some goes elsewhere; None where none does, as far as `MOST_OPERATIONS`
    show.
    """
    goal, start = get_gradient_edge(source), get_gradient_edge(result)
    if _key(goal) == _key(start):
        return None
    waiting, seen, reached, elsewhere = [start.node], {start.node}, False, False
    while waiting and len(seen) <= MOST_OPERATIONS:
        node = waiting.pop()
        elsewhere = elsewhere or not node.next_functions  # a parameter, or another leaf of the graph
        for below, output in node.next_functions:
            if below is None:
                continue
            if (below, output) == _key(goal):
                reached = True
            elif below not in seen:
                seen.add(below)
                waiting.append(below)
    return (not elsewhere and not waiting) if reached else None


def _key(edge: GradientEdge) -> tuple[Any, int]:
    return edge.node, edge.output_nr


def share_scaled(logits: torch.Tensor, matrix: torch.Tensor, rounding: float) -> float:
    """The share of tokens whose matrix is diag(a) exp(logits) diag(b) for some positive a and b.

    ``logits, matrix``: (m, n, n), of which the matrices are positive.
    Returns: Between 0 and 1; below 1 for the right logits too, where models add small numbers to entries that are
    smaller still.
    """
    few = spread(len(matrix), COMPARED_TOKENS).to(matrix.device)
    logs, entries = logits[few].double(), matrix[few].double()
    n = entries.shape[-1]
    difference = (entries.log() - logs.to(entries.device)).flatten(1)  # (m, n²)
    allowed = CLOSE + 4 * rounding + ADDED / entries.flatten(1)
    if not difference.isfinite().all():
        return 0.0
    eye, ones = torch.eye(n, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    # Column k of the design is one row's, then one column's term.
    design = torch.cat([torch.kron(eye, ones), torch.kron(ones, eye)], dim=1).to(entries.device)
    weighted = design / allowed.unsqueeze(-1)
    terms = torch.linalg.pinv(weighted) @ (difference / allowed).unsqueeze(-1)
    rest = (difference - (design @ terms).squeeze(-1)).abs()
    return float((rest <= 3 * allowed).all(1).double().mean())


def as_matrices(tensor: torch.Tensor, batch: int, tokens: int, n: int) -> Iterator[torch.Tensor]:
    """A tensor as matrices (B, T, n, n), rows and columns as they stand and exchanged, in each way that its shape allows."""
    while tensor.ndim > 4 and tensor.shape[0] == 1:  # such as an axis of one proposal
        tensor = tensor.squeeze(0)
    for each in per_token(tensor, (n, n), batch, tokens):
        yield from (each, each.mT)


def is_same_matrix(
    tensor: torch.Tensor, wanted: torch.Tensor, *, batch: int, tokens: int, rows: Sequence[int]
) -> bool:
    """Whether a tensor is H_res of some sequences (K, T, n, n), or its transpose."""
    limit = SAME * max(1.0, float(wanted.abs().max()))
    return any(
        bool(
            (
                (each[list(rows), : wanted.shape[1]].to(wanted.device, torch.float32) - wanted).abs() <= limit
            ).all()
        )
        for each in as_matrices(tensor, batch, tokens, wanted.shape[-1])
    )


@dataclass
class Handled:
    """The matrices that some code handled, and those whose exponential it took.

    Parameters
    ----------
    exponentials : list of (Tensor, int)
        In order, each with torch's count of writes when its exponential was taken.
    matrices : list of Tensor
        In order; the same tensor may be there several times.
    num_earlier : int
        How many matrices were there when the first exponential was taken.
    error : Exception or None
        Why no more was kept.
    """

    exponentials: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)
    matrices: list[torch.Tensor] = field(default_factory=list)
    num_earlier: int = 0
    error: Exception | None = None

    @property
    def earlier(self) -> list[tuple[torch.Tensor, int | None]]:
        """The matrices before the first exponential, the last one first, each with torch's count of writes."""
        before = self.matrices[: self.num_earlier] if self.exponentials else []
        return [(matrix, version(matrix)) for matrix in reversed(before)]

    def add(self, argument: torch.Tensor | None, results: Iterable[torch.Tensor]) -> None:
        """Note one operation: the tensor whose exponential it takes, if it takes one, and its results."""
        if argument is not None:
            if not self.exponentials:
                self.num_earlier = len(self.matrices)
            self.exponentials.append((argument, version(argument)))
        self.matrices.extend(results)

    def release(self) -> None:
        """Drop the tensors: a graph must not live longer than the user's."""
        self.exponentials, self.matrices = [], []


class OperationLogits:
    """The matrices among all values of a traced forward, and those whose exponential is taken; a listener of `Trace`.

    Parameters
    ----------
    num_streams : int
        n: tensors are kept whose last two axes are n × n.
    now : callable
        How many values the trace has.
    """

    def __init__(self, num_streams: int, now: Callable[[], int]):
        self._tail, self._now = (num_streams, num_streams), now
        self._seen: list[tuple[int, torch.Tensor | None, int | None, list[torch.Tensor]]] = []
        self._error: Exception | None = None

    def __call__(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Look at an operation that has run; an error of ours must not reach the user's forward.

        ``func, args, kwargs, result``: the operation, what it took and what it gave.
        """
        if self._error is not None:
            return
        try:
            name = func.overloadpacket.__name__.lstrip("_")
            argument = exponential_argument(name.removeprefix("safe_"), args)
            if argument is not None and tuple(argument.shape[-2:]) != self._tail:
                argument = None
            made = (result,) if isinstance(result, torch.Tensor) else tensors_in(result)
            kept = [
                each for each in made if tuple(each.shape[-2:]) == self._tail and each.is_floating_point()
            ]
            if kept or argument is not None:
                written = None if argument is None else version(argument)
                self._seen.append((self._now(), argument, written, kept))
        except Exception as error:
            self._error = without_frames(error)

    def between(self, first: int, last: int) -> Handled:
        """What was handled between two values of the trace, by their numbers."""
        found = Handled(error=self._error)
        for at, argument, written, kept in self._seen:
            if first < at <= last:
                found.add(argument, kept)
                if argument is not None:
                    found.exponentials[-1] = argument, written
        return found


class LogitWatch:
    """Look at what the code of one call handles: a listener of `Watch`, the mode that sees its functions.

    Parameters
    ----------
    sizes : collection of int
        Numbers of elements of the tensors that are kept.

    Attributes
    ----------
    handled : Handled
        What was seen.
    """

    def __init__(self, sizes: Iterable[int]):
        self._sizes = frozenset(sizes)
        self.handled = Handled()

    def __call__(self, func: Any, args: Any, result: Any) -> None:
        """Look at what a function that has run took and gave."""
        if self.handled.error is None:
            try:
                self._keep(getattr(func, "__name__", ""), args, result)
            except (Exception, GeneratorExit) as error:  # the user's function has run, whatever we met
                self.handled = Handled(error=without_frames(error))

    def _keep(self, name: str, args: Any, result: Any) -> None:
        argument = exponential_argument(name, args) if name in EXPONENTIALS else None
        if argument is not None and argument.numel() not in self._sizes:
            argument = None
        made = (result,) if isinstance(result, torch.Tensor) else tensors_in(result)
        kept = [each for each in made if each.numel() in self._sizes and each.is_floating_point()]
        if kept or argument is not None:
            self.handled.add(argument, kept)


def find_logits(
    exponentials: Sequence[tuple[torch.Tensor, int | None]],
    others: Sequence[tuple[torch.Tensor, int | None]],
    matrices: Sequence[torch.Tensor],
    wanted: torch.Tensor,
    *,
    batch: int,
    tokens: int,
    rows: Sequence[int],
    rounding: float,
) -> tuple[int, int, int] | str:
    """Find the logits among the tensors that a connection computed.

    ``exponentials``: whose exponential was taken, in order; each with torch's count of writes at that time.
    ``others``: computed before the first of these, the last one first: Sinkhorn in logarithms may add to the logits
    before it takes an exponential.
    ``matrices``: those that are H_res, or its transpose, in order.
    ``wanted``: H_res of some sequences (K, T, n, n).
    Returns: Indices among both kinds of candidates together, among the matrices, and of the reading of `as_matrices` in
    which the logits have the orientation of ``wanted``; or why there are none.
    """
    n = wanted.shape[-1]
    graphs = [number for number, each in enumerate(matrices) if each.requires_grad]
    if not graphs or not bool((wanted > 0).all()):
        return NOT_POSITIVE if graphs else NO_GRAPH if matrices else NOT_SEEN
    flat, first = wanted.flatten(0, -3), False
    for position, (logits, written) in enumerate((*exponentials, *others)):
        # Only the first one: later exponentials may be of what was projected already, as of Sinkhorn in logarithms.
        if first and position < len(exponentials):
            continue
        # The last matrix is what is applied; in the rounds before, it may have been the same number already.
        own = [at for at in graphs if matrices[at].numel() == logits.numel()]
        if not own or not logits.requires_grad or written != version(logits):
            continue
        passes = passes_through(matrices[own[-1]], logits)
        first = first or passes is not None
        if not passes:
            continue
        shares = [
            share_scaled(each[list(rows), : wanted.shape[1]].flatten(0, -3).to(flat.device), flat, rounding)
            for each in as_matrices(logits.detach(), batch, tokens, n)
        ]
        best = max(range(len(shares)), key=shares.__getitem__)
        if shares[best] >= (ENOUGH if position < len(exponentials) else NEARLY_ALL):
            return position, own[-1], best
    return NOT_FOUND
