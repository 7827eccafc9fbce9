"""Which affine map of a state is read best by the head? The tuned lens: one map a depth, from the identity on.

    x_l  ↦  x_l A_l + b_l,    A_l = I, b_l = 0 at the start

Trained to bring the head's reading of each depth close to the model's output (KL), as Belrose et al. (2303.08112) do. The
start of the training is a weighted ridge regression on the last state,

    (A, b) = argmin Σ ‖x A + b − x_L‖² / ‖x_L‖² + λ ‖A − I‖²,

which costs no forward of the head. What is reported of a sequence comes from maps that were trained without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from depthscope.probes.interventions.predictions import divergence
from depthscope.probes.lens.head import Head

# By how much the identity is preferred, in units of the mean eigenvalue of the states' second moments; infinity leaves it.
RIDGES = (float("inf"), 10.0, 1.0, 1e-1, 1e-2, 1e-3)
LEARNING_RATE = 1e-2
# So many multiplications take about a minute on two cores; a heuristic of ours. Steps are counted, not timed: the same
# numbers come on every machine.
BUDGET = 2e12
MOST_STEPS = 60


@dataclass(frozen=True)
class Affine:
    """x ↦ x A + b, float32."""

    matrix: torch.Tensor
    offset: torch.Tensor

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """The map of states (…, D), in their own precision."""
        return (state.float() @ self.matrix + self.offset).to(state.dtype)


def identity(width: int, device: torch.device) -> Affine:
    """The map that changes nothing."""
    return Affine(torch.eye(width, device=device), torch.zeros(width, device=device))


@dataclass(frozen=True)
class Example:
    """States of one batch at one depth, what they become, and what the model says.

    ``state, last``: (B, T, N, D), at the depth and at the last one.
    ``logits``: (B, T, V), the output.
    ``head``: of this batch.
    ``counted``: (B, T), true on real tokens.
    """

    state: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor
    head: Head
    counted: torch.Tensor


def train(examples: Sequence[Example], chosen: Sequence[torch.Tensor], steps: int) -> Affine:
    """The map of one depth, from some of the sequences.

    ``chosen``: (B,) a batch, true on the sequences to train on.
    ``steps``: of gradient descent on the KL divergence, after the regression.
    """
    fitted, held = _halves(chosen)
    start = _regression(examples, fitted, held)
    if not steps:
        return start
    tuned = _descend(examples, fitted, start, steps)
    # The training may fit what these sequences have of their own: kept where it helps on those that it did not see.
    return min((start, tuned), key=lambda lens: mean_divergence(examples, held, lens))


def _halves(chosen: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every second chosen sequence, and the others; both are all of them where there is one."""
    counts = torch.cat([rows.long() for rows in chosen]).cumsum(0)
    parts = list(zip(counts.split([len(rows) for rows in chosen]), chosen, strict=True))
    if int(counts[-1]) < 2:
        return list(chosen), list(chosen)
    return (
        [rows & (count % 2 == 1) for count, rows in parts],
        [rows & (count % 2 == 0) for count, rows in parts],
    )


def _rows(example: Example, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (n, D), last states (n, D) and weights (n,) of the chosen sequences' real tokens, every stream a row."""
    real = (example.counted & chosen.to(example.counted.device)[:, None]).to(example.state.device)
    x, y = example.state[real].double().flatten(0, 1), example.last[real].double().flatten(0, 1)
    # The head's norm sees directions: a token with massive activations counts as much as any other.
    return x, y, 1 / y.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def _regression(
    examples: Sequence[Example], fitted: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
) -> Affine:
    width, device = examples[0].state.shape[-1], examples[0].state.device
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
    cross = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
    for example, rows in zip(examples, fitted, strict=True):
        x, y, weight = _rows(example, rows)
        ones = torch.cat([x, x.new_ones(len(x), 1)], -1)
        weighted = ones * weight[:, None]
        gram += ones.mT @ weighted
        cross += weighted.mT @ (y - x)  # of what is left to the identity
    candidates = [_solved(gram, cross, ridge) for ridge in RIDGES]
    return min(candidates, key=lambda lens: _misses(examples, held, lens))


def _solved(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> Affine:
    width = cross.shape[-1]
    start = identity(width, cross.device)
    if ridge == float("inf"):
        return start
    strength = ridge * gram.diagonal()[:width].mean().clamp_min(torch.finfo(torch.float64).tiny)
    penalty = torch.eye(width + 1, dtype=gram.dtype, device=gram.device) * strength
    # The offset is free, but for a trace that keeps the system solvable.
    penalty[width, width] = strength * 1e-9
    delta = torch.linalg.solve(gram + penalty, cross).float()
    return Affine(start.matrix + delta[:width], delta[width])


def _misses(examples: Sequence[Example], held: Sequence[torch.Tensor], lens: Affine) -> float:
    """Weighted squared error of the last state on held-out sequences."""
    total = 0.0
    for example, rows in zip(examples, held, strict=True):
        x, y, weight = _rows(example, rows)
        total += float(((lens(x).double() - y).square().sum(-1) * weight).sum())
    return total


def mean_divergence(examples: Sequence[Example], chosen: Sequence[torch.Tensor], lens: Affine) -> float:
    """Mean KL(output ‖ lens) over the real tokens of some sequences, in nats."""
    total, count = 0.0, 0
    for example, rows in zip(examples, chosen, strict=True):
        with torch.no_grad():
            found = divergence(example.logits.float(), example.head(lens(example.state)).float())
        counted = (example.counted & rows.to(example.counted.device)[:, None]).to(found.device)
        total += float(found[counted].sum())
        count += int(counted.sum())
    return total / max(count, 1)


def _descend(
    examples: Sequence[Example], chosen: Sequence[torch.Tensor], start: Affine, steps: int
) -> Affine:
    matrix, offset = start.matrix.clone().requires_grad_(), start.offset.clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix, offset], lr=LEARNING_RATE / matrix.shape[0] ** 0.5)
    for step in range(steps):
        example, rows = examples[step % len(examples)], chosen[step % len(examples)]
        counted = (example.counted & rows.to(example.counted.device)[:, None]).to(example.logits.device)
        if not bool(counted.any()):
            continue
        with torch.enable_grad():
            logits = example.head(Affine(matrix, offset)(example.state)).float()[counted]
            target = torch.log_softmax(example.logits.float()[counted], -1)
            loss = (target.exp() * (target - torch.log_softmax(logits, -1))).sum(-1).mean()
            # Of the map alone: the weights of the model get no gradient.
            matrix.grad, offset.grad = torch.autograd.grad(loss, (matrix, offset))
        optimizer.step()
    return Affine(matrix.detach(), offset.detach())


def affordable_steps(examples: Sequence[Example], depths: int, folds: int) -> int:
    """How many steps of descent the budget allows at every depth."""
    first = examples[0]
    tokens, width, words = (
        first.logits.shape[0] * first.logits.shape[1],
        first.state.shape[-1],
        first.logits.shape[-1],
    )
    # Two multiplications forward and four backward an entry of the unembedding.
    cost = 6.0 * tokens * width * words * depths * folds
    return int(min(MOST_STEPS, BUDGET / cost))
