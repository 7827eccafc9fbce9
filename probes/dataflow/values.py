"""What is known of one value of a forward, and of the operation that made it? Data only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthscope.probes.dataflow.axes import Axes

if TYPE_CHECKING:
    from depthscope.probes.dataflow.operations import Rule

NONE = -1  # the number of no value


@dataclass(slots=True)
class Coefficient:
    """A tensor that scaled or mixed a value, and how often it had been written when it did."""

    tensor: torch.Tensor
    version: int | None

    @property
    def unchanged(self) -> bool:
        """Whether it is what it was."""
        return self.version == times_written(self.tensor)


_names: dict[int, tuple[str, Any]] = {}  # by the identity of an operation, which is kept as well


class Step:
    """The transparent operation that made a value.

    Parameters
    ----------
    rule : Rule
        What the operation is.
    func : OpOverload
        The operation itself.
    args, kwargs
        What it took: a `Value` in place of every traced tensor.
    operands : tuple of Value
        The values among these, in order.
    coefficients : dict of int to Coefficient
        Of a product, by the position of the operand: the tensors of the operands that may be coefficients, and were small
        enough to be kept.
    item : int
        Which of the operation's outputs.
    """

    __slots__ = ("args", "coefficients", "func", "item", "kwargs", "operands", "rule")

    def __init__(self, rule: Rule, func: Any, args: Any, kwargs: Any, operands: Any, item: int = 0):
        self.rule = rule
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.operands: tuple[Value, ...] = operands
        self.coefficients: dict[int, Coefficient] = {}
        self.item = item

    @property
    def name(self) -> str:
        """Name of the operation, the same for the version that writes in place; of writes through a view ``"patch"``."""
        known = _names.get(id(self.func))
        if known is None:
            name = "patch" if self.func is None else str(self.func).split(".")[1].removesuffix("_")
            known = _names[id(self.func)] = name, self.func
        return known[0]


class Value:
    """One value that was computed in a forward.

    Parameters
    ----------
    number : int
        Among all values, in the order in which they were made.
    axes : Axes
        What its axes are.
    tensor : Tensor
        That holds it: its shape, dtype and device are kept.
    step : Step, optional
        The transparent operation that made it; None where an opaque one did.
    call : int
        Order of the innermost module call that made it; -1 outside of all.
    ordinal : int
        Among the values that this call made itself.
    merges : int
        How many sums with something computed from it a state went through up to here. Heuristic: it tells which values
        may be states, and proves nothing.
    """

    __slots__ = (
        "__weakref__",
        "axes",
        "call",
        "device",
        "dtype",
        "func",
        "last_merge",
        "merges",
        "number",
        "ordinal",
        "root",
        "shape",
        "step",
    )

    def __init__(self, number: int, tensor: torch.Tensor, axes: Axes, call: int):
        self.number = number
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.axes = axes
        self.call = call
        self.ordinal = 0
        self.step: Step | None = None
        self.func: Any = None
        self.merges = 0
        self.root = number  # number of the last of these sums, or of what the first of them was added to
        self.last_merge = NONE  # number of the last such sum of any state that it was computed from

    def __repr__(self) -> str:
        name = "input" if self.func is None else str(self.func)
        return f"Value({self.number}, {name}, {self.shape}, merges={self.merges})"


def carrier_of(step: Step) -> Value:
    """The operand that carries a state: the largest factor of a product, else that which went through most sums."""
    operands = step.operands
    if len(operands) == 1:
        return operands[0]
    if not step.rule.product and len(operands) == 2 and operands[0].merges != operands[1].merges:
        return operands[0] if operands[0].merges > operands[1].merges else operands[1]

    def preference(operand: Value) -> tuple[int, int, int]:
        size = math.prod(operand.shape)
        first, second = (size, operand.merges) if step.rule.product else (operand.merges, size)
        return first, second, -operand.number

    return max(operands, key=preference)


def times_written(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written in place; None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version
