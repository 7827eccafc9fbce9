"""Does an operation carry a memory, and where do its elements go? One rule for each group of operations.

A rule takes the numbers of the operands that are of the memory and gives those of the result, or None where the operation
is opaque: where it adds different elements up, mixes tokens or features, or is not linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from depthscope.probes.reading.graph import Graph, TracedValue, filled, values_in
from depthscope.probes.reading.numbers import NOTHING, Numbers, joined
from depthscope.probes.reading.operations import (
    ADDING,
    FUNCTIONS,
    JOINS,
    MATRICES,
    MIXED_ALONG,
    MOVES,
    PARTS,
    PRODUCTS,
    REDUCES,
    SAME,
    SCATTERS,
    SUMS,
    VIEWS,
    addends,
    centred,
    factors,
    is_along_features,
    linear_in,
    mixed_axes,
    part_of,
    spreads,
)  # fmt: skip
from depthscope.probes.reading.tensor_memory import patched

Carried = dict[int, Numbers]
# Whether a piece that was computed from a memory may be joined to it as a further stream.
MayJoin = Callable[[TracedValue, Numbers], bool]


class Rules:
    """The rules of one forward for one memory."""

    def __init__(self, graph: Graph, carried: Carried, *, functions: bool, may_join: MayJoin):
        self._graph, self._carried = graph, carried
        self._functions, self._may_join = functions, may_join

    def numbers(self, value: TracedValue) -> Numbers | None:
        """The numbers of what an operation gives; None where it is opaque."""
        found = self._ruled(value)
        return None if found is None or found.shape != value.shape or not found.count else found.shared()

    def _ruled(self, value: TracedValue) -> Numbers | None:
        rule = _RULES.get(value.name)
        try:
            return None if rule is None else rule(self, value)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None  # torch does not move whole numbers so, an index was not kept, or axes do not fit

    def _inside(self, value: TracedValue) -> list[TracedValue]:
        return [operand for operand in linear_in(value) if operand.number in self._carried]

    def _of(self, argument: Any) -> Numbers | None:
        return self._carried.get(argument.number) if isinstance(argument, TracedValue) else None

    def _same(self, value: TracedValue) -> Numbers | None:
        return self._of(value.args[0])

    def _move(self, value: TracedValue) -> Numbers | None:
        own = self._of(value.args[0])
        if own is None:
            return None
        if value.name in VIEWS:
            return own.reshape(value.shape)
        short = _SHORT_MOVES.get(value.name)
        if short is not None:
            return short(own, value)
        tensor = torch.from_numpy(np.ascontiguousarray(own.dense()))
        if value.name == "constant_pad_nd":
            return Numbers.of(value.func(tensor, value.args[1], NOTHING).numpy())
        rest = filled(value.args[1:], self._graph.tensor)
        out = value.func(tensor, *rest, **filled(value.kwargs, self._graph.tensor))
        return Numbers.of((out[value.item] if isinstance(out, (list, tuple)) else out).numpy())

    def _sum(self, value: TracedValue) -> Numbers | None:
        carriers = [v for v in dict.fromkeys(addends(value)) if v.number in self._carried]
        if len(carriers) < len(self._inside(value)):
            return None  # a condition, a weight or a factor comes from the memory itself
        if any(self._is_filled(value, carrier) for carrier in carriers):
            return None  # what is added lies where the memory holds nothing, as in channels that were padded: another begins
        means = centred(value, carriers)
        if means and not (self._functions and all(map(is_along_features, means))):
            return None  # the first half of a norm, or a mixing of tokens
        numbers = [self._carried[v.number].expand(value.shape) for v in carriers]
        found: Numbers | None = numbers[0]
        for other in numbers[1:]:
            found = None if found is None else found.agreed(other)
        return found

    def _is_filled(self, value: TracedValue, carrier: TracedValue) -> bool:
        """Whether something as large is added to what has places that hold nothing."""
        holds = self._carried[carrier.number].count
        others = (v for v in addends(value) if v.number not in self._carried)
        return holds < carrier.numel == value.numel and any(
            other.numel == value.numel and self._graph.has_origin(other) for other in others
        )

    def _product(self, value: TracedValue) -> Numbers | None:
        carriers = [f for f in factors(value) if self._of(f) is not None]
        if len(carriers) != 1 or len(self._inside(value)) != 1 or value.kwargs.get("rounding_mode"):
            return None
        is_layer = spreads(value, carriers[0])  # features of each number
        return None if is_layer else self._carried[carriers[0].number].expand(value.shape)

    def _mixed(self, value: TracedValue) -> Numbers | None:
        """Streams may be mixed, or put into another order; tokens and features may not."""
        own, axes = self._of(value.args[MIXED_ALONG[value.name]]), mixed_axes(value)
        if own is None or axes is None or len(self._inside(value)) != 1:
            return None
        found = own.collapsed(axes)
        if found is None:
            return None
        return found.reshape(value.shape) if value.name in REDUCES else found.expand(value.shape)

    def _matrix(self, value: TracedValue) -> Numbers | None:
        first, second = factors(value)
        a, b = self._of(first), self._of(second)
        if (a is None) == (b is None):
            return None
        own, other = (a, second) if a is not None else (b, first)
        assert own is not None
        axis = len(own.shape) - (1 if a is not None or len(own.shape) == 1 else 2)
        found = own.collapsed([axis])
        if found is None:
            return None
        if len(own.shape) == 1 or len(other.shape) == 1:
            return found.reshape(value.shape) if found.count == value.numel else found.expand(value.shape)
        return found.expand(value.shape)

    def _join(self, value: TracedValue) -> Numbers | None:
        pieces = list(values_in(value.args[0]))
        axis = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)
        axis %= len(value.shape)
        model = next(self._carried[p.number] for p in pieces if p.number in self._carried)
        found = []
        for piece in pieces:
            own = self._carried.get(piece.number)
            if own is None:
                own = self._new_piece(value, piece, model, axis)
            if own is None:
                return None
            found.append(
                own.reshape((*own.shape[:axis], 1, *own.shape[axis:])) if value.name == "stack" else own
            )
        return joined([f for f in found if f is not None], axis)

    def _new_piece(self, value: TracedValue, piece: TracedValue, model: Numbers, axis: int) -> Numbers | None:
        """The numbers of a stream that was computed from others; other tokens or features are a new memory."""
        if not self._may_join(piece, model):
            return None
        if value.name == "stack":
            return model
        one = model.collapsed([axis])
        # An empty cache, which torch joins to anything, has one axis.
        return None if one is None or len(piece.shape) != len(model.shape) else one.expand(piece.shape)

    def _scatter(self, value: TracedValue) -> Numbers | None:
        if value.name == "copy":
            own = self._of(value.args[1])
            return None if own is None else own.expand(value.shape)
        base, source = (value.args[at] for at in SCATTERS[value.name])
        under, given = self._of(base), self._of(source)
        if given is None:
            return under
        beneath = under.dense() if under is not None else np.full(value.shape, NOTHING)
        put = self._put(value, source, beneath, given.dense())
        adds = value.name in ADDING or (len(value.args) > 3 and value.name == "index_put" and value.args[3])
        found, old = Numbers.of(put), Numbers.of(beneath)
        return found if not adds or old is None or found is None else old.agreed(found)

    def _put(
        self, value: TracedValue, source: TracedValue, beneath: np.ndarray, given: np.ndarray
    ) -> np.ndarray:
        """The numbers after a write of some into others, by the operation itself."""
        under, new = torch.from_numpy(beneath.copy()), torch.from_numpy(np.ascontiguousarray(given))
        args, tensor = value.args, self._graph.tensor
        if value.name == "patch":
            return patched(under, new, args[2], args[3], empty=NOTHING).numpy()
        if value.name == "index_add":
            return under.index_copy(args[1], tensor(args[2]), new).numpy()
        if value.name == "scatter_add":
            return under.scatter(args[1], tensor(args[2]), new).numpy()
        if value.name == "index_put":
            return torch.ops.aten.index_put(under, filled(args[1], tensor), new).numpy()
        rest = filled(args[1:], lambda v: new if v is source else tensor(v))
        return value.func(under, *rest, **value.kwargs).numpy()

    def _function(self, value: TracedValue) -> Numbers | None:
        alone = self._functions and value.item == 0 and len(self._inside(value)) == 1
        return self._of(value.args[0]) if alone else None


def places_in(graph: Graph, value: TracedValue, operand: TracedValue) -> Numbers | None:
    """Which elements of an operand lie where in what an operation gives."""
    carried = {operand.number: Numbers.first(operand.shape)}
    return Rules(graph, carried, functions=False, may_join=lambda piece, model: False).numbers(value)


def _part(own: Numbers, value: TracedValue) -> Numbers:
    """The numbers of a part of an axis."""
    axis, part = part_of(value)
    return own.take(axis, part if isinstance(part, slice) else part % own.shape[axis])


def transposed(own: Numbers, value: TracedValue) -> Numbers:
    """The numbers with two axes exchanged, which is its own inverse."""
    dims = list(range(len(own.shape)))
    a, b = (0, -1) if value.name == "t" else value.args[1:3]
    dims[a], dims[b] = dims[b], dims[a]
    return own.permute(dims)


# Moves that are computed from the vectors of the axes alone.
_SHORT_MOVES: dict[str, Callable[[Numbers, TracedValue], Numbers | None]] = {
    "permute": lambda own, value: own.permute([dim % len(own.shape) for dim in value.args[1]]),
    "transpose": transposed,
    "t": transposed,
    "unsqueeze": lambda own, value: own.reshape(value.shape),
    "squeeze": lambda own, value: own.reshape(value.shape),
    "expand": lambda own, value: own.expand(value.shape),
    **dict.fromkeys(PARTS, _part),
}
_RULES: dict[str, Callable[[Rules, TracedValue], Numbers | None]] = {
    **dict.fromkeys(FUNCTIONS, Rules._function),
    **dict.fromkeys(SAME, Rules._same),
    **dict.fromkeys(MOVES, Rules._move),
    **dict.fromkeys(SUMS, Rules._sum),
    **dict.fromkeys(PRODUCTS, Rules._product),
    **dict.fromkeys(MIXED_ALONG, Rules._mixed),
    **dict.fromkeys(MATRICES, Rules._matrix),
    **dict.fromkeys(JOINS, Rules._join),
    **dict.fromkeys(SCATTERS, Rules._scatter),
}
