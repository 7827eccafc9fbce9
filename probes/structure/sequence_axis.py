"""Along which axis are the sequences of the batch? Followed from what the model was called with, through every operation.

In row-major order the elements of neighbouring sequences are a fixed number of elements apart: the *stride* of the batch. A
view has the same stride, a transposition another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from depthscope.probes.model.layout import LayoutError
from depthscope.probes.reading.graph import (
    INPUT,
    SHAPE_ONLY,
    Graph,
    ReadingError,
    TracedValue,
    names,
    values_in,
)
from depthscope.probes.reading.operations import MATRICES, ROW_MAJOR

TURNS = names("permute transpose t mT movedim")
REMOVES = names("select unbind sum mean amax amin max min prod any all argmax logsumexp linalg_vector_norm")
PARTS = names("slice narrow split split_with_sizes chunk index_select")
SHUFFLES = names("index index_select gather")
SOFTMAX = names("_softmax softmax _safe_softmax _log_softmax log_softmax cumsum")


class SequenceAxis:
    """Where the sequences are in every value of a forward.

    ``graph``: the forward.
    ``batch_size``: how many sequences there are.
    ``axis``: along which axis of what the model was called with they are.
    """

    def __init__(self, graph: Graph, batch_size: int, axis: int):
        self.graph, self.size, self.axis = graph, batch_size, axis
        self._mixed: set[int] = set()  # operations that add several sequences up, by the number of the value
        # How far the elements of neighbouring sequences are apart, and how many sequences a value has.
        self._found: list[tuple[int, int] | None] = []
        for value in graph.values if batch_size > 1 else ():
            self._found.append(
                self._axis_of_input(value, axis) if value.kind else self._axis_of_result(value)
            )

    def stride(self, value: TracedValue) -> int | None:
        """How far the elements of neighbouring sequences are apart; None where that is not known, or there is one sequence."""
        stride, size = (self._found[value.number] if self.size > 1 else None) or (None, 0)
        return stride if size == self.size else None

    def place(self, value: TracedValue) -> tuple[int, int] | None:
        """The axis of a value that has the sequences, and how many of its places each of them takes in a row."""
        stride = self.stride(value)
        return None if stride is None else _place(value.shape, stride, self.size)

    def is_mixed(self, first: TracedValue, last: TracedValue) -> bool:
        """Whether something between two values goes along the sequences, as an attention over tokens does."""
        between = (self.graph.values[n] for n in self._mixed if first.number < n < last.number)
        return any(self.graph.depends(v, first) and self.graph.depends(last, v) for v in between)

    def mixed_error(self, state: TracedValue, packed: str) -> LayoutError:
        """The refusal of a first state along whose sequences the branches go.

        ``packed``: the layout that reads all tokens as those of one sequence.
        """
        rows = "where the rows are the nodes of a graph, say layout='B D'"
        if len(state.shape) == 3 and state.shape[self.axis] == self.size:
            own = "T B D" if self.axis else "B T D"
            rows = f"where the sequences meet in the branches alone, as in experts of a limited capacity, say layout={own!r}"
        return LayoutError(
            f"the state of shape {state.shape} has its tokens along the axis that the model's first tensor has its sequences "
            "along: several sequences may be packed into one, and would be measured as one. Call the model with one sequence "
            f"in each row of the batch, padded where they differ in length; or say with layout={packed!r} that all "
            f"tokens are to be read as those of one sequence; {rows}"
        )

    def _axis_of_input(self, value: TracedValue, axis: int) -> tuple[int, int] | None:
        if value.kind != INPUT or len(value.shape) <= axis or value.shape[axis] != self.size:
            return None
        return math.prod(value.shape[axis + 1 :]), self.size

    def _axis_of_result(self, value: TracedValue) -> tuple[int, int] | None:
        found: list[tuple[int, int]] = []
        if value.name in SHAPE_ONLY:  # a new constant, whose axes are its own
            return None
        for position, argument in enumerate(value.args):
            for operand in values_in(argument):
                given = self._found[operand.number]
                after = (
                    self._axis_of_picked
                    if value.name == "index" and len(value.parents) > 2
                    else self._axis_after
                )
                own = None if given is None else after(value, position, operand, *given)
                found += [] if own is None else [own]
        return max(found, key=lambda of: of[1]) if found else None

    def _axis_after(
        self, value: TracedValue, position: int, operand: TracedValue, stride: int, size: int
    ) -> tuple[int, int] | None:
        """The same of what an operation gives, by one of its operands."""
        if value.name in ROW_MAJOR:
            return (stride, size) if value.numel == operand.numel else None
        place = _place(operand.shape, stride, size) if operand.numel else None
        if place is None:
            # What several axes have together may be put into another order.
            self._mixed |= {value.number} if value.name in SHUFFLES and operand.numel else set()
            return None
        dim, inner = place
        if self._goes_along(value, position, len(operand.shape), dim):
            self._mixed.add(value.number)
            return None
        new = _new_dim(value, position, len(operand.shape), dim)
        if new is None:
            # Of an operation that is not known: the only axis of the size of the batch.
            dims = [dim for dim, length in enumerate(value.shape) if length == self.size]
            return (math.prod(value.shape[dims[0] + 1 :]), self.size) if len(dims) == 1 else None
        if not 0 <= new < len(value.shape):
            return None
        if value.shape[new] != operand.shape[dim]:  # some of the sequences, where the axis has nothing else
            if value.name not in PARTS or inner * size != operand.shape[dim]:
                return None
            size = value.shape[new] // inner
        return inner * math.prod(value.shape[new + 1 :]), size

    def _axis_of_picked(
        self, value: TracedValue, position: int, operand: TracedValue, stride: int, size: int
    ) -> tuple[int, int] | None:
        """The same of what several tensors of numbers pick out of an operand, by the numbers of its sequences."""
        if position or _place(operand.shape, stride, size) is None:
            return self._axis_after(value, position, operand, stride, size)
        try:
            own = torch.arange(operand.numel).div(stride, rounding_mode="floor").remainder(size)
            picked = [None if of is None else self.graph.tensor(of).cpu() for of in value.args[1]]
            found = torch.ops.aten.index(own.reshape(operand.shape), picked).flatten()
        except (ReadingError, RuntimeError):
            return None
        counts = found.bincount(minlength=size)
        if not len(found) or not bool((counts == counts[0]).all()):
            return None
        each = len(found) // size
        return (each, size) if bool((found == torch.arange(len(found)) // each).all()) else None

    @staticmethod
    def _goes_along(value: TracedValue, position: int, rank: int, dim: int) -> bool:
        """Whether an operation adds up, or slides along, an axis of an operand."""
        if value.name in MATRICES:
            a, b = MATRICES[value.name]
            return dim == {a: rank - 1, b: max(rank - 2, 0)}.get(position)
        # Whole numbers are counted, as the tokens of an expert are
        if value.name in SOFTMAX and value.is_floating:
            return isinstance(value.args[1], int) and value.args[1] % rank == dim
        if "attention" in value.name:
            return position < 3 and dim == rank - 2
        if value.name != "convolution" or position or dim < 2:
            return False
        return value.args[1].shape[dim] > 1  # a kernel of one element reads each place alone


def _place(shape: Sequence[int], stride: int, size: int) -> tuple[int, int] | None:
    """The axis that has the sequences, and how many of its places each of them takes in a row."""
    below = 1
    for dim in reversed(range(len(shape))):
        if stride < below * shape[dim] or (stride == below and shape[dim] == size):
            inner, rest = divmod(stride, below)
            fits = not rest and inner and shape[dim] % (inner * size) == 0
            return (dim, inner) if fits else None
        below *= shape[dim]
    return None


def _new_dim(value: TracedValue, position: int, rank: int, dim: int) -> int | None:
    """Which axis of what an operation gives an axis of an operand is; None where that is not known."""
    name, args, new_rank = value.name, value.args, len(value.shape)
    if name in TURNS:
        return _transposed_dim(value, rank, dim)
    if name in MATRICES:
        # Of a product of matrices the rows are the first factor's, and the columns the second one's.
        return new_rank - 1 if position == MATRICES[name][1] and dim == rank - 1 else dim + new_rank - rank
    if name in REMOVES and new_rank < rank:
        gone = args[1] if len(args) > 1 else 0 if name == "unbind" else None
        dims = {d % rank for d in ([gone] if isinstance(gone, int) else gone or range(rank))}
        return None if dim in dims else dim - sum(d < dim for d in dims)
    if name == "stack":
        at = (args[1] if len(args) > 1 else 0) % new_rank
        return dim + (dim >= at)
    if name == "index_select" and position == 2:
        return int(args[1]) % new_rank
    if name in ("embedding", "index", "unfold"):
        return dim if position == (1 if name == "embedding" else 0) else 0 if rank == 1 else dim
    if new_rank >= rank:  # axes are aligned from the last one on
        return dim + new_rank - rank
    return None


def _transposed_dim(value: TracedValue, rank: int, dim: int) -> int | None:
    if value.name == "permute":
        return [d % rank for d in value.args[1]].index(dim)
    if value.name == "movedim":
        return None
    a, b = (d % rank for d in (value.args[1:3] if value.name == "transpose" else (-2, -1)))
    return {a: b, b: a}.get(dim, dim)
