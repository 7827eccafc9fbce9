"""Would the loss fall if modules gave more, or less? Derivatives along the scale of what each module gives, and a few steps.

A trained network is at a minimum of its loss along the scale of what each of its modules gives, since the weights that it was
trained in have that scale. One whose weights are used otherwise than they were trained (another scale of the logits, an eps, a
gain, a checkpoint in part) is not, and some steps of descent along these scales show how much of the loss that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics.experiments import estimate
from depthscope.probes.model.loss_graph import Loss, loss_value
from depthscope.probes.model.modules import module_paths
from depthscope.probes.model.preserved_state import eager, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model, copied

FEWEST = 4  # sequences, of which the derivatives of one scale are compared
# A derivative counts from so many standard errors over the sequences on: by chance hardly one of 50 would, of 10 sequences.
SURE = 2.5
# Steps of descent. Each scale has a step of its own (Riedmiller & Braun 1993), in the logarithm of its factor: it grows while
# the sign of its derivative stays, and shrinks where that changes.
STEPS, FIRST, LONGEST, FASTER, SLOWER = 7, 0.2, 1.0, 1.6, 0.4
FARTHEST = 3.5
PATIENCE = 2  # steps without a lower loss
# What the first steps have to promise, as a share of what can be lost, before any is made.
PROMISE = 0.02
NAMED = 3


@dataclass
class Scales:
    """What the modules with parameters give, in a forward and its backward.

    ``sequences``: number of sequences of the batch.
    ``logs``: the logarithm of the factor that is put on what a module gives, by its path.
    """

    sequences: int
    logs: Mapping[str, float] = field(default_factory=dict)
    given: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    of_sequences: dict[str, torch.Tensor] = field(default_factory=dict)
    """∂loss / ∂log factor of what a module gives, by its path, for each sequence."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Put the factors on."""
        handles = [
            module.register_forward_hook(partial(self._gave, path))
            for path, module in module_paths(model)
            if path and any(p is not None and p.is_floating_point() for p in module._parameters.values())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.given.clear()

    def _gave(self, path: str, module: nn.Module, given: Any, output: Any) -> Any:
        parts = output if isinstance(output, tuple) else (output,)
        tensor = parts[0] if parts else None
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.requires_grad:
            return None
        factor = self.logs.get(path, 0.0)
        if factor:
            tensor = tensor * math.exp(factor)
        self.given.append((path, tensor, tensor._version))
        if not factor:
            return None
        # A tuple with names, as some modules return, takes its fields one by one.
        made = (tensor, *parts[1:])
        return tensor if parts is not output else type(output)(*made) if hasattr(output, "_fields") else made

    def add(self, path: str, tensor: torch.Tensor, version: int, gradient: torch.Tensor) -> None:
        """Add what one gradient says; of what was rewritten since, or has no axis of sequences, it says nothing."""
        if tensor._version != version or not tensor.ndim or not len(tensor) or len(tensor) % self.sequences:
            return
        product = tensor.detach().float() * gradient.detach().float()
        rows = product.reshape(self.sequences, -1).sum(1, dtype=torch.float64).cpu()
        before = self.of_sequences.get(path)
        self.of_sequences[path] = rows if before is None else before + rows


def sure(rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The derivatives of the loss along the logarithm of a factor that chance does not explain, by module."""
    slopes = {path: sure_slope(of, len(of)) for path, of in rows.items()}
    return {path: slope for path, slope in slopes.items() if slope}


def sure_slope(rows: torch.Tensor, sequences: int) -> float:
    """The sum over a batch of what some of its sequences give; 0 where chance explains it.

    ``sequences``: of the batch.
    """
    if len(rows) < 2:
        return 0.0
    total, error = float(rows.mean()) * sequences, float(rows.std()) / math.sqrt(len(rows)) * sequences
    return total if math.isfinite(total) and abs(total) > SURE * error and error > 0 else 0.0


def promises(derivatives: Mapping[str, float], reach: float) -> bool:
    """Whether the first steps along these derivatives promise a part of what can be lost."""
    return FIRST * sum(map(abs, derivatives.values())) > PROMISE * reach


@dataclass
class _Descent:
    """Steps along scales, each with a length of its own, and the best place that they came to."""

    logs: dict[str, float] = field(default_factory=dict)
    best: tuple[float, dict[str, float], torch.Tensor | float] = (math.inf, {}, 0.0)
    """Its loss, its factors, and the way of each sequence's loss to it, by the derivatives at its places."""
    waited: int = 0
    _way: torch.Tensor | float = 0.0
    _made: dict[str, float] = field(default_factory=dict)  # the last step
    _rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _lengths: dict[str, float] = field(default_factory=dict)
    _slopes: dict[str, float] = field(default_factory=dict)

    def arrive(self, loss: float, rows: Mapping[str, torch.Tensor]) -> None:
        """Note the loss of the present place, and its derivatives for each sequence."""
        for path, moved in self._made.items():
            if path in rows and path in self._rows:
                self._way = self._way + 0.5 * moved * (rows[path] + self._rows[path])
        self._rows = rows
        self.waited += 1
        if loss < self.best[0]:
            self.best, self.waited = (loss, dict(self.logs), self._way), 0

    def step(self, slopes: Mapping[str, float]) -> None:
        """Go down along the derivatives that are known."""
        self._made = {}
        for path, slope in slopes.items():
            turned = self._slopes.get(path, 0.0) * slope
            grown = FASTER if turned > 0 else SLOWER if turned < 0 else 1.0
            self._lengths[path] = min(self._lengths.get(path, FIRST) * grown, LONGEST)
            self._slopes[path] = slope
            before = self.logs.get(path, 0.0)
            moved = before - math.copysign(self._lengths[path], slope)
            self.logs[path] = max(-FARTHEST, min(FARTHEST, moved))
            self._made[path] = self.logs[path] - before


def rescaled(
    model: nn.Module, parts: Sequence[Any], loss: Loss | None, *, reach: float, steps: int = STEPS
) -> dict[str, Any]:
    """What the loss would be with other scales of what the modules give, and which; empty where none is lower.

    ``parts``: of a batch, for one forward each; sequences are the first axis of what modules give.
    ``reach``: what there is to lose, in the units of the loss.
    ``steps``: at most so many forwards with their backward.
    Returns: With ``half_width``, that of a 95 % interval over the sequences.
    """
    descent, base = _Descent(), math.nan
    for number in range(steps):
        value, rows = _derivatives(model, parts, loss, descent.logs)
        if value is None or not math.isfinite(value):
            break
        slopes = sure(rows)
        if not number:
            base = value
            if not promises(slopes, reach):
                return {}
        descent.arrive(value, rows)
        if descent.waited >= PATIENCE:
            break
        descent.step(slopes)
    lowest, logs, way = descent.best
    if not lowest < base:
        return {}
    named = sorted(logs.items(), key=lambda each: -abs(each[1]))[:NAMED]
    return {
        "loss": base,
        "rescaled": lowest,
        "modules": sum(each != 0.0 for each in logs.values()),
        "most": [[path, math.exp(each)] for path, each in named],
        "half_width": _half_width(way, lowest - base),
    }


def _half_width(way: torch.Tensor | float, change: float) -> float:
    """Of the change of the loss, over the ways of the sequences, whose sum is that change but for the length of the steps."""
    total = float(way.sum()) if isinstance(way, torch.Tensor) else 0.0
    if not isinstance(way, torch.Tensor) or not total * change > 0.0:
        return abs(change)  # the derivatives do not explain it
    found = estimate((way * len(way) * change / total).numpy())
    return min((found.high - found.low) / 2, abs(change))


def _derivatives(
    model: nn.Module, parts: Sequence[Any], loss: Loss | None, logs: Mapping[str, float]
) -> tuple[float | None, dict[str, torch.Tensor]]:
    """The loss with these factors, and its derivatives for each sequence; nothing is written to the model."""
    sizes = list(map(first_size, parts))
    total, of_parts = 0.0, list[dict[str, torch.Tensor]]()
    for part, size in zip(parts, sizes, strict=True):
        scales, share = Scales(size, logs), size / sum(sizes)
        with _as_measured(model), torch.enable_grad(), scales.on(model):
            given = copied(part)
            value = loss_value(call_model(model, given), given, loss, required=False)
            made = list(scales.given)
            if value is None or not value.requires_grad or not made:
                return None, {}
            gradients = torch.autograd.grad(value, [tensor for _, tensor, _ in made], allow_unused=True)
            for (path, tensor, version), gradient in zip(made, gradients, strict=True):
                if gradient is not None:
                    scales.add(path, tensor, version, gradient)
        total += share * float(value.detach())
        of_parts.append({path: share * rows for path, rows in scales.of_sequences.items()})
    shared = [path for path in of_parts[0] if all(path in of for of in of_parts)]
    return total, {path: torch.cat([of[path] for of in of_parts]) for path in shared}


@contextmanager
def _as_measured(model: nn.Module) -> Iterator[None]:
    """A forward made inside leaves nothing behind, and is none of a recorder's."""
    with preserved_state(model), eager(), own_call(object()):
        yield


def first_size(batch: Any) -> int:
    """Number of rows of the first tensor of a batch."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 0)
