"""What are the logits of a mixing matrix? The tensor whose exponential, scaled by rows and by columns, is H_res.

Softmax and any number of rounds of Sinkhorn multiply the rows and columns of exp(H̃) by factors:

    H_res = diag(a) exp(H̃) diag(b),      so that      log H_res − H̃ = log a 1ᵀ + 1 (log b)ᵀ

The recorded graph shows them: H_res is computed from them alone, and from nothing else that was given. The equation proves
them, whatever code projects, and their orientation. A tensor for which either fails is not taken.
Shapes: B batch, T token, n streams; m some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from depthscope.probes.connections.proof import per_token, spread
from depthscope.probes.reading.graph import INPUT, PARAMETER, Graph, TracedValue, names

# torch's names of operations that take logits; of a stable softmax written by hand, of its exponential.
EXPONENTIALS = names("exp _softmax _safe_softmax _log_softmax logsumexp")
# What models add to their entries and sums so that they divide by no zero, about 1e-6, over the smallest sum that it may have
# been divided by since: it moves the logarithm of small entries. Heuristic.
ADDED = 1e-4
# Coefficients of float32 that are the same numbers: they were copied, or extracted by a product with zeros and ones.
SAME = 3e-6
CLOSE = 1e-3  # of logarithms, where nothing was added; a heuristic
COMPARED_TOKENS = 64  # a wrong tensor, or the wrong orientation, differs at nearly every token
# Shares of tokens at which the equation holds. Of what an exponential takes, and H_res is computed from alone, it
# decides the orientation alone: saturated logits of DeepSeek-V4 reach 0.5, the wrong orientation 0. Of other tensors, such as
# logits before a temperature, it is all that there is. Heuristics.
ENOUGH, NEARLY_ALL = 0.1, 0.9

NOT_POSITIVE = "H_res has entries that are not positive: it is not a scaled exponential of logits"
NO_GRAPH = "the forward kept no graph, in which logits are recognised"
NOT_FOUND = (
    "no tensor whose exponential was taken gives H_res by scaling its rows and columns, and nothing else"
)
NOT_SEEN = "the matrix itself is not a tensor that the module's own code handles"


class FoundLogits(NamedTuple):
    """The logits of a matrix, that matrix, and which reading of `as_matrices` has the logits in its orientation."""

    logits: TracedValue
    matrix: TracedValue
    reading: int

    def turned(self, tensor: torch.Tensor, batch: int, tokens: int, n: int) -> torch.Tensor:
        """Logits, or their gradient, as (B, T, n, n) with destinations as rows where the matrix has them as rows."""
        return next(islice(as_matrices(tensor.detach(), batch, tokens, n), self.reading, None))


def exponential_arguments(graph: Graph, behind: set[int]) -> list[int]:
    """The numbers of the values whose exponential was taken, in the order of that, for what some others were computed from."""
    taken = (graph.values[number] for number in sorted(behind) if graph.values[number].name in EXPONENTIALS)
    return list(dict.fromkeys(value.parents[0].number for value in taken))


def is_only_source(graph: Graph, result: TracedValue, source: TracedValue) -> bool | None:
    """Whether a value was computed from another one, and apart from that from no number that was given or learned.

    Returns: False where it was computed from others too; None where not from this one at all.
    """
    if result is source:
        return None
    waiting, seen, reached = [result], {result.number}, False
    while waiting:
        for parent in waiting.pop().parents:
            if parent is source:
                reached = True
            elif parent.number not in seen and parent.is_floating:
                if parent.kind in (INPUT, PARAMETER):
                    return False if reached or graph.depends(result, source) else None
                seen.add(parent.number)
                waiting.append(parent)
    return True if reached else None


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
    first = wanted[0, 0].flatten().tolist()
    for each in as_matrices(tensor, batch, tokens, wanted.shape[-1]):
        # One token first, as plain numbers: most candidates, such as the rounds of Sinkhorn, differ there.
        one = each[rows[0], 0].flatten().tolist()
        if not all(abs(a - b) <= 2 * limit for a, b in zip(one, first, strict=True)):
            continue
        few = each[list(rows), : wanted.shape[1]].to(wanted.device, torch.float32)
        if bool(((few - wanted).abs() <= limit).all()):
            return True
    return False


def find_logits(
    graph: Graph,
    values: Sequence[TracedValue],
    matrices: Sequence[TracedValue],
    wanted: torch.Tensor,
    behind: set[int],
    tensor: Callable[[TracedValue], torch.Tensor],
    learns: Callable[[TracedValue], bool],
    *,
    batch: int,
    tokens: int,
    rows: Sequence[int],
    rounding: float,
) -> FoundLogits | str:
    """Find the logits among what a connection computed.

    ``values``: from which its matrices were computed, in order.
    ``matrices``: those that are H_res, or its transpose, in order.
    ``wanted``: H_res of some sequences (K, T, n, n).
    ``behind``: what the matrices were computed from, and they.
    ``tensor, learns``: the tensor of a value, and whether it has a graph.
    Returns: Why there are none, where there are none.
    """
    learned = [each for each in matrices if learns(each)]
    if not learned or not bool((wanted > 0).all()):
        return NOT_POSITIVE if learned else NO_GRAPH if matrices else NOT_SEEN
    flat, first = wanted.flatten(0, -3), False
    known = {each.number: each for each in values}
    taken = [known[n] for n in exponential_arguments(graph, behind) if n in known]
    # Sinkhorn in logarithms may add to the logits before it takes an exponential.
    before = [each for each in values if taken and each.number < taken[0].number][::-1]
    for position, logits in enumerate((*taken, *before)):
        # Only the first one: later exponentials may be of what was projected already, as of Sinkhorn in logarithms.
        if first and position < len(taken):
            continue
        # The last matrix is what is applied; in the rounds before, it may have been the same number already.
        own = [matrix for matrix in learned if matrix.numel == logits.numel]
        if not own or not learns(logits):
            continue
        alone = is_only_source(graph, own[-1], logits)
        first = first or alone is not None
        if not alone:
            continue
        shares = [
            share_scaled(each[list(rows), : wanted.shape[1]].flatten(0, -3).to(flat.device), flat, rounding)
            for each in as_matrices(tensor(logits).detach(), batch, tokens, wanted.shape[-1])
        ]
        best = max(range(len(shares)), key=shares.__getitem__, default=0)
        if shares and shares[best] >= (ENOUGH if position < len(taken) else NEARLY_ALL):
            return FoundLogits(logits, own[-1], best)
    return NOT_FOUND
