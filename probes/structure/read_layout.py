"""How are the axes of a state ordered? By where the elements of its memory's first value are in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from depthscope.probes.model.layout import LayoutError, canonical, parse_layout
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import INPUT, SHAPE_ONLY, Graph, TracedValue, names, values_in
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import MATRICES, ROW_MAJOR, only_moves

TURNS = names("permute transpose t mT movedim")
REMOVES = names("select unbind sum mean amax amin max min prod any all argmax logsumexp linalg_vector_norm")
PARTS = names("slice narrow split split_with_sizes chunk index_select")
SHUFFLES = names("index index_select gather")
SOFTMAX = names("_softmax softmax _safe_softmax _log_softmax log_softmax cumsum")


class SequenceAxis:
    """Where the sequences are in every value of a forward, of which the model was called with some along one axis."""

    def __init__(self, graph: Graph, batch_size: int, axis: int):
        self.graph, self.size, self.axis = graph, batch_size, axis
        self._mixed: set[int] = set()  # operations that add several sequences up, by the number of the value
        # How far the elements of neighbouring sequences are apart, and how many sequences a value has.
        self._found: list[tuple[int, int] | None] = []
        for value in graph.values if batch_size > 1 else ():
            self._found.append(self._axis_of(value))

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
        """The refusal of a first state along whose sequences the branches go; ``packed``: the layout of one sequence."""
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

    def _axis_of(self, value: TracedValue) -> tuple[int, int] | None:
        if value.kind:
            is_batch = value.kind == INPUT and value.shape[self.axis : self.axis + 1] == (self.size,)
            return (math.prod(value.shape[self.axis + 1 :]), self.size) if is_batch else None
        if value.name in SHAPE_ONLY:  # a new constant, whose axes are its own
            return None
        found = [
            self._axis_after(value, position, operand, *given)
            for position, argument in enumerate(value.args)
            for operand in values_in(argument)
            if (given := self._found[operand.number]) is not None
        ]
        return max((of for of in found if of is not None), key=lambda of: of[1], default=None)

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


Part = tuple[str, int, int]  # a letter, its size, and how far the numbers of neighbours along it are apart


def read_layout(memory: MemoryReading, numbers: Numbers, sequences: SequenceAxis) -> str:
    """The layout of a value with some numbers; empty where its axes have none, LayoutError where the first one has no B."""
    parts = _parts_of_first(memory, sequences)
    named = None if numbers.array is not None else _named_axes(numbers.axes, parts)
    if named is None:
        return ""
    flat = [letter for axis in named for letter in axis]
    # Tokens with features: no size tells them apart.
    merged = any(len(set(axis) - set("BNF")) > 1 for axis in named)
    if len(set(flat)) < len(flat) or "D" not in flat or merged:
        return ""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in named)


def _named_axes(axes: Sequence[np.ndarray], parts: Sequence[Part]) -> list[list[str]] | None:
    single = [letter for letter, size, _ in parts if size == 1]
    named: list[list[str]] = []
    for vector in axes:
        letters = ["N"] if len(vector) == 1 else _letters(vector, parts)
        if letters is None:
            return None
        if len(vector) == 1 and single:
            letters = [single.pop(0)]
        named.append(letters)
    streams = [axis for axis in named if "N" in axis]
    features = next((axis for axis in named if "D" in axis), [])
    # Parts of the features of each stream, or further streams, that are connected separately
    if len(streams) == 2:
        inner = features if "N" in features else streams[1]
        inner[inner.index("N")] = "F"
    if "B" in single:  # one sequence, of which the state has no axis
        tokens = next((axis for axis in named if axis[0] == "T"), named[0])
        tokens.insert(0, "B")
    sides = [axis for axis in named if "T" in axis]
    if len(sides) in (2, 3):  # of an image or a film, or of several series side by side
        for axis, letter in zip(sides, "THW"[-len(sides) :], strict=True):
            axis[axis.index("T")] = letter
    return named


def _parts_of_first(memory: MemoryReading, sequences: SequenceAxis) -> list[Part]:
    """The axes of one stream of the first value, outer first: features, the batch, and tokens."""
    root = sequences.graph.values[memory.root]
    stride, place = sequences.stride(root), sequences.place(root)
    if stride is not None and place is not None:  # the first value may have its streams along some axis
        (dim, inner), vectors = place, memory.carried[memory.root].axes
        stride = int(vectors[dim][inner] - vectors[dim][0]) if vectors else stride
        if not stride:
            raise LayoutError(
                "the sequences lie along the axis that was read as that of the streams; name it with layout="
            )
    return _with_batch(_parts(memory.shape, memory.feature_axis, stride, sequences.size), sequences.size)


def _parts(shape: Sequence[int], features: int, stride: int | None, batch_size: int) -> list[Part]:
    found: list[Part] = []
    for dim, size in enumerate(shape):
        below = math.prod(shape[dim + 1 :])
        if dim == features:
            found.append(("D", size, below))
        elif stride is not None and below <= stride < below * size:
            inner = stride // below
            outer = size // (inner * batch_size)
            split = [("T", outer, stride * batch_size), ("B", batch_size, stride), ("T", inner, below)]
            found += [part for part in split if part[0] == "B" or part[1] > 1]
        else:
            found.append(("T", size, below))
    return found


def _with_batch(parts: list[Part], batch_size: int) -> list[Part]:
    """With an axis of sequences: where the operations do not show it, the first one of that size."""
    if any(letter == "B" for letter, _, _ in parts):
        return parts
    at = next((n for n, (letter, size, _) in enumerate(parts) if letter == "T" and size == batch_size), None)
    if at is not None:
        return [*parts[:at], ("B", *parts[at][1:]), *parts[at + 1 :]]
    if batch_size == 1:
        return [("B", 1, 0), *parts]
    raise LayoutError(
        f"the first state has the axes {[size for _, size, _ in parts]}, of which none is one of {batch_size} sequences; call "
        "the model with one sequence in each row of the batch, or say how it is read with layout=, as layout='T D' for all "
        "tokens as those of one sequence; where the model runs the batch in parts, call it with the sequences of one part"
    )


def _letters(vector: np.ndarray, parts: Sequence[Part]) -> list[str] | None:
    """Which axes of the first value, and of streams, one axis of a value is made of; outer first."""
    rest, found = vector - vector[0], list[str]()
    while len(rest) > 1:
        step = int(rest[1] - rest[0])
        changed = np.flatnonzero(rest != step * np.arange(len(rest)))
        places, letter = int(changed[0]) if len(changed) else len(rest), "N"
        if step:
            within = [p for p in parts if p[2] <= step < p[1] * p[2] and not step % p[2]]
            if not within:
                return None
            letter, size, stride = within[0]
            places = min(places, size * stride // step)
        if len(rest) % places or (rest.reshape(-1, places) - rest[::places, None] != rest[:places]).any():
            return None
        if found[-1:] != [letter]:  # rows and columns of an image that were merged are tokens
            found.append(letter)
        rest = rest[::places]
    return found[::-1]


def num_fractions(numbers: Numbers, layout: str) -> int:
    """Into how many parts the features of each stream are split in a value of a layout that may name such."""
    groups = parse_layout(layout)
    if not any("F" in group for group in groups):
        return 1
    at = next(n for n, group in enumerate(groups) if "F" in group)
    vector = numbers.axes[at]
    same = (vector == vector[0]).sum()
    return int(same)


def shape_layout(value: TracedValue, sequences: SequenceAxis) -> str:
    """The layout of a value in no memory: features or channels, and LayoutError where it has no axis of sequences."""
    convolutions = [other for other in sequences.graph.values if other.name == "convolution"]
    convolved = any(of.args[0].shape == value.shape and len(value.shape) > 2 for of in convolutions)
    features = 1 if convolved else len(value.shape) - 1
    parts = _with_batch(
        _parts(value.shape, features, sequences.stride(value), sequences.size), sequences.size
    )
    letters = [letter for letter, _, _ in parts]
    if letters.count("T") == 2 and any(len(of.shape) == 4 for of in convolutions):  # an image
        letters[letters.index("T")] = "H"
        letters[letters.index("T")] = "W"
    if len(letters) != len(value.shape) or letters.count("T") > 1:
        raise LayoutError(
            f"a state of shape {value.shape} for {sequences.size} sequences has no plain layout; say how it is read with "
            "layout=, for example layout='B T N D', '(B N) T D' or 'B H W D'"
        )
    return " ".join(letters)


def token_order(
    memory: MemoryReading, numbers: Numbers, layout: str, batch_size: int, num_streams: int
) -> torch.Tensor:
    """Which of a reading's tokens each (sequence, token) is, (B, T); LayoutError where the layout mixes tokens up."""
    places = canonical(
        torch.from_numpy(numbers.dense().copy()),
        layout,
        batch_size=batch_size,
        num_streams=num_streams,
        fractions=num_fractions(numbers, layout),
    )
    order = _tokens(memory, places[:, :, 0, 0].numpy())
    if len(np.unique(order)) != order.size:
        raise LayoutError(f"the layout {layout!r} has the same token twice; expected each once")
    return torch.from_numpy(order)


def tokens_of(memory: MemoryReading, numbers: Numbers) -> torch.Tensor:
    """Of which of a reading's tokens each element of a value is, flat; −1 for what holds nothing yet."""
    flat = numbers.dense().reshape(-1)
    return torch.from_numpy(np.where(flat < 0, -1, _tokens(memory, np.maximum(flat, 0))))


def _tokens(memory: MemoryReading, elements: np.ndarray) -> np.ndarray:
    """The reading's tokens of some elements of the memory's first value."""
    places = np.unravel_index(elements, memory.shape)
    kept = [index for dim, index in enumerate(places) if dim != memory.feature_axis]
    return np.asarray(np.ravel_multi_index(kept, memory.token_shape)) if kept else np.zeros_like(elements)


def repeats_first(graph: Graph, memory: MemoryReading) -> bool:
    """Whether the first value is every stream of the first state: each next one is made of it n times, by ways of its own."""
    if len(memory.states) < 2 or len(memory.states[0].values) > 1:
        return False
    (first,), following, n = memory.states[0].values, memory.states[1].values, memory.num_streams
    while len(takers := graph.takers(graph.values[first])) == 1 and only_moves(takers[0]):
        if takers[0].number not in memory.carried or takers[0].numel != graph.values[first].numel:
            break
        first = takers[0].number
    # By value: the steps right after the first one through which it is carried there
    ways: dict[int, set[int]] = {}
    for number in sorted(of for of in memory.carried if of > first):
        parents = [parent.number for parent in graph.values[number].parents]
        ways[number] = {number} if first in parents else set().union(*(ways.get(of, set()) for of in parents))
    steps = [{first} if number == first else ways.get(number, set()) for number in following]
    times = {len(of) for of in steps}  # how often the first value comes into a stream
    are_distinct = len(steps) == n and len(set().union(*steps)) == sum(map(len, steps))
    return are_distinct and times == {n}
