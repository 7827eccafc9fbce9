"""How does one value depend linearly on others? The transparent steps between them are walked back, and run once more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch

from depthscope.diagnostics.errors import InputError
from depthscope.probes.dataflow.operations import replayed
from depthscope.probes.dataflow.values import Value

NOT_KEPT = "a coefficient as large as what it scales was not kept"
REWRITTEN = "a coefficient was rewritten in place after it was used"


class ReplayError(InputError):
    """A linear map whose coefficients are not there any more."""


class LinearDependence:
    """A value as a linear function of some earlier ones, at the coefficients of this forward.

    Parameters
    ----------
    target : Value
        The value.
    origins : iterable of Value
        The earlier ones. The walk back ends at these, and at what no transparent step made: a *source*.

    Attributes
    ----------
    reached : tuple of Value
        The origins on which the target depends linearly, in order of their numbers.
    sources : tuple of Value
        What else is added up in it.
    functions : tuple of Value
        Norms and activations of one operand among the sources, such as the norm of a post-norm block.
    """

    def __init__(self, target: Value, origins: Iterable[Value]):
        self.target = target
        self._origins = {id(origin): origin for origin in origins if origin is not target}
        self._order = self._walk()
        self._carried = self._mark()
        self.reached = tuple(v for v in self._order if id(v) in self._origins and id(v) in self._terms)
        self.sources = tuple(v for v in self._order if id(v) not in self._origins and id(v) in self._ends)
        self.functions = tuple(v for v in self.sources if v.step is not None and v.step.rule.function)

    @property
    def carrying(self) -> tuple[Value, ...]:
        """The values on the way that carry an origin."""
        return tuple(value for value in self._order if id(value) in self._carried)

    def _is_end(self, value: Value) -> bool:
        return id(value) in self._origins or value.step is None or value.step.rule.function

    def _walk(self) -> list[Value]:
        """All values that transparent steps lead back to, by their numbers."""
        found = {id(self.target): self.target}
        waiting = [self.target]
        while waiting:
            value = waiting.pop()
            if self._is_end(value):
                continue
            assert value.step is not None
            for operand in value.step.operands:
                if id(operand) not in found:
                    found[id(operand)] = operand
                    waiting.append(operand)
        return sorted(found.values(), key=lambda value: value.number)

    def _mark(self) -> set[int]:
        """Which values carry an origin; those where two factors do are no linear functions of it, hence sources."""
        carried: set[int] = set()
        self._ends: set[int] = set()
        for value in self._order:
            if id(value) in self._origins:
                carried.add(id(value))
            elif self._is_end(value):
                self._ends.add(id(value))
            else:
                assert value.step is not None
                carriers = [operand for operand in value.step.operands if id(operand) in carried]
                if value.step.rule.product and len(carriers) > 1:
                    self._ends.add(id(value))
                elif carriers:
                    carried.add(id(value))
        self._terms = self._needed(carried)
        return carried

    def _needed(self, carried: set[int]) -> set[int]:
        """What is added up in the target: without the factors that only scale."""
        needed: set[int] = set()
        ends: set[int] = set()
        waiting = [self.target]
        while waiting:
            value = waiting.pop()
            if id(value) in needed:
                continue
            needed.add(id(value))
            if id(value) in self._origins:
                continue
            if id(value) in self._ends or self._is_end(value):
                ends.add(id(value))
                continue
            assert value.step is not None
            operands = value.step.operands
            if value.step.rule.product and any(id(operand) in carried for operand in operands):
                waiting += [operand for operand in operands if id(operand) in carried]
            elif value.step.rule.product and len(operands) > 1:
                ends.add(id(value))  # a scaled branch: which factor is the branch does not matter here
            else:
                waiting += operands
        self._ends = ends
        return needed

    # --- in numbers

    def apply(self, given: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        """The target where the origins have other values, and the sources none.

        ``given``: by the number of the origin; others count as zero.
        """
        results: dict[int, torch.Tensor | None] = {}
        for value in self._order:
            if id(value) not in self._terms:
                continue
            if id(value) in self._origins:
                results[id(value)] = given.get(value.number)
            elif id(value) in self._ends:
                results[id(value)] = None
            else:
                results[id(value)] = self._step(value, results)
        return results[id(self.target)]

    def _step(self, value: Value, results: Mapping[int, torch.Tensor | None]) -> torch.Tensor | None:
        step = value.step
        assert step is not None
        tensors = [results.get(id(operand)) for operand in step.operands]
        if all(tensor is None for tensor in tensors):
            return None
        if step.rule.product:
            for position, operand in enumerate(step.operands):
                if id(operand) not in self._carried:
                    tensors[position] = _coefficient(value, operand)
        for coefficient in step.coefficients.values():
            if not coefficient.unchanged:
                raise ReplayError(REWRITTEN)
        return replayed(value, tensors)

    # --- in words

    @cached_property
    def scales(self) -> dict[int, float | None]:
        """By the number of an origin, the factor that it comes in with; None where that is no single number."""
        return {origin.number: self._scale_of(origin) for origin in self.reached}

    def _scale_of(self, origin: Value) -> float | None:
        scale: dict[int, float | None] = {id(origin): 1.0}
        for value in self._order:
            step = value.step
            if (
                id(value) not in self._terms
                or step is None
                or id(value) in self._origins
                or id(value) in self._ends
            ):
                continue
            carriers = [operand for operand in step.operands if id(operand) in scale]
            if carriers:
                scale[id(value)] = _scaled(value, [scale[id(operand)] for operand in carriers], carriers)
        return scale.get(id(self.target))

    @cached_property
    def mixes(self) -> bool:
        """Whether an origin's positions along some axis, such as its streams, are added up on the way."""
        return any(
            value.step is not None and value.step.rule.mixes
            for value in self._order
            if id(value) in self._terms and id(value) in self._carried and id(value) not in self._origins
        )


def _coefficient(value: Value, operand: Value) -> torch.Tensor:
    step = value.step
    assert step is not None
    for position, kept in step.coefficients.items():
        if step.args[position] is operand or step.rule.factors(step.args)[position] is operand:
            return kept.tensor.detach()
    raise ReplayError(NOT_KEPT)


def _scaled(value: Value, scales: list[float | None], carriers: list[Value]) -> float | None:
    """The factor after one step, where it is a number for the whole value."""
    step = value.step
    assert step is not None
    name = step.name
    if any(scale is None for scale in scales):
        return None
    known = [scale for scale in scales if scale is not None]
    if name in WHOLE:
        return known[0]
    if name == "neg":
        return -known[0]
    if name in ("add", "sub", "rsub"):
        return _added(step.args, step.kwargs, name, carriers, known)
    if name in ("mul", "div"):
        factor = step.args[1] if step.args[0] is carriers[0] else step.args[0]
        if isinstance(factor, (int, float)):
            return known[0] * factor if name == "mul" else known[0] / factor
        if isinstance(factor, torch.Tensor) and factor.numel() == 1:
            number = float(factor.detach())
            return known[0] * number if name == "mul" else known[0] / number
    return None


# Steps that give every element once, unchanged.
WHOLE = frozenset(
    ("alias", "detach", "clone", "contiguous", "_to_copy", "lift_fresh", "view", "_unsafe_view", "reshape",
     "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "copy", "flatten", "unflatten", "to")
)  # fmt: skip


def _added(args: tuple, kwargs: Mapping, name: str, carriers: list[Value], scales: list[float]) -> float:
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[name]
    total, rest = 0.0, list(zip(carriers, scales, strict=True))
    for argument, sign in zip(args[:2], signs, strict=True):
        for position, (carrier, scale) in enumerate(rest):
            if argument is carrier:
                total += sign * scale
                del rest[position]
                break
    return total
