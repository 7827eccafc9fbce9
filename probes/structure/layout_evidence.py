"""What the calls of one forward show of a state's axes: an image, tokens first, or streams merged into an axis.

Merged streams show where the first state consists of equal copies (streams start as copies of the embedding), or where the
blocks write a part of the state's width only (the mixing is functional, and the branches work on one stream's width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from depthscope.probes.model.tensors import here
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.tape import Call, Tape

MAX_STREAMS = 32  # heuristic: published models have 2 to 16; a larger count would be a coincidence of sizes
CORNER = 4  # elements along each axis that are compared first


@dataclass(frozen=True)
class Copies:
    """An axis of the first state along which it consists of equal copies.

    Parameters
    ----------
    axis : int
        The axis.
    count : int
        How many copies.
    outer : bool
        Whether the axis is (copies, rest), not (rest, copies).
    """

    axis: int
    count: int
    outer: bool


@dataclass(frozen=True)
class LayoutEvidence:
    """What the calls of one forward show of the axes of a chain's state.

    Parameters
    ----------
    image : str
        ``"first"`` or ``"last"``, where the channels of an image state are; empty where the state is no image.
    tokens_first : bool
        Whether a module that takes the state declares ``batch_first=False``.
    copies : tuple of Copies
        Along which axes the first state repeats itself.
    parts : int
        Number of parts of the state, one of which the branches of its blocks write; 1 where they write all of it.
    """

    image: str = ""
    tokens_first: bool = False
    copies: tuple[Copies, ...] = ()
    parts: int = 1


def read_evidence(tape: Tape, chain: Chain) -> LayoutEvidence:
    """Read what the calls show of a chain's states.

    ``tape``: the calls of one forward, with the tensor that the first block took.
    """
    if chain.points[0].item:
        return _evidence_of_track(tape, chain)
    takers = {(point.path, point.method, point.index) for point in chain.points if point.at == "input"}
    blocks = [call for call in tape.calls if call.key in takers]
    if (
        not blocks
    ):  # the chain of values that modules return: its axes are told by the operations, or by its shape alone
        return LayoutEvidence()
    first, inside = blocks[0], _calls_during(tape, blocks[0])
    # The first block of a stage may change the shape, and what its branches write shows nothing.
    constant = next((block for block in blocks if block.x_shape == block.y_shape), None)
    return LayoutEvidence(
        image=_image_channels(tape, first, inside),
        tokens_first=any(
            getattr(call.module, "batch_first", None) is False and call.x_shape == first.x_shape
            for call in inside
        ),
        copies=tuple(copies for copies in _equal_copies(first.x) if _made_by_expansion(tape, first, copies)),
        parts=1 if constant is None else _parts_written(constant, _calls_during(tape, constant)),
    )


def _evidence_of_track(tape: Tape, chain: Chain) -> LayoutEvidence:
    """A further state of pairs of tokens is a grid of the first state's tokens; of others only the shape is known."""
    point, shape = chain.points[0], chain.shapes[0]
    first = next(call for call in tape.calls if call.key == (point.path, point.method, point.index)).x_shape
    pairs = len(shape) == 4 and len(first) == 3 and shape[1] == shape[2] == first[1]
    return LayoutEvidence(image="last" if pairs else "")


def _calls_during(tape: Tape, block: Call) -> list[Call]:
    """The block's call and all calls during it."""
    return [call for call in tape.calls[block.order :] if call is block or call.inside(block)]


# --- images ---


def _image_channels(tape: Tape, first: Call, inside: list[Call]) -> str:
    """Where the channels of an image are, by evidence beyond its shape: other 4-D states, such as streams, have the same."""
    shape = first.x_shape
    if len(shape) != 4:
        return ""
    # torch's convolutions take channels first.
    if any(_is_spatial(call.module) and call.x_shape[2:] == shape[2:] for call in inside):
        return "first"
    # Without one (window attention, MLP-Mixers) the model must have been called with an image, of which the state is a
    # smaller grid, and some matrix must write all of the state: those of streams write one stream.
    image = tape.calls[0].x_shape
    if len(image) != 4 or not any(_writes_all(call, first) for call in inside[1:]):
        return ""
    if _shrunk_alike(image[2:], shape[1:3]) and not any(
        isinstance(call.module, nn.Conv2d) for call in inside
    ):
        return "last"
    return "first" if _shrunk_alike(image[2:], shape[2:]) else ""


def _is_spatial(module: nn.Module) -> bool:
    """Whether a convolution has a kernel over neighbours on a grid; one that only mixes channels (or streams) has not."""
    return isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1


def _writes_all(call: Call, first: Call) -> bool:
    return _has_matrix(call.module) and math.prod(call.y_shape) == math.prod(first.x_shape)


def _shrunk_alike(image: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether both axes shrink by one factor."""
    factors = {round(size / small) for size, small in zip(image, grid, strict=True)}
    return len(factors) == 1 and min(factors) >= 1


# --- merged streams ---


def _made_by_expansion(tape: Tape, first: Call, copies: Copies) -> bool:
    """Whether copies along the second axis were made by an expansion: an earlier call then gave the state without it.

    Along this axis copies may also be equal tokens, such as padding, at a first state without positions.
    """
    shape = first.x_shape
    if copies.axis != 1 or len(shape) != 3:
        return True
    one = (shape[0], shape[2]) if copies.count == shape[1] else (shape[0], shape[1] // copies.count, shape[2])
    return any(call.y_shape == one for call in tape.calls[: first.order])


def _equal_copies(state: torch.Tensor | None) -> Iterable[Copies]:
    """For every axis the largest number of equal copies along it."""
    if state is None or not state.numel():
        return
    state = here(state.detach())
    for axis, size in enumerate(state.shape):
        counts = [count for count in range(min(size, MAX_STREAMS), 1, -1) if size % count == 0]
        # (copies, rest) before (rest, copies): where the state is constant along the axis both fit, and mean the same.
        ways = [Copies(axis, count, outer) for count in counts for outer in (True, False)]
        yield from islice((way for way in ways if _all_equal(_split(state, way))), 1)


def _split(state: torch.Tensor, way: Copies) -> torch.Tensor:
    rest = state.shape[way.axis] // way.count
    split = state.unflatten(way.axis, (way.count, rest) if way.outer else (rest, way.count))
    return split.movedim(way.axis if way.outer else way.axis + 1, 0)


def _all_equal(parts: torch.Tensor) -> bool:
    """Whether all parts are equal, and not constant: a state of zeros repeats itself in every way."""
    corner = parts[(slice(None), *[slice(CORNER)] * (parts.ndim - 1))]
    for compared in (corner, parts):  # most differ in the corner already, which is cheap to compare
        if not bool((compared == compared[0]).all()):
            return False
    return bool((parts[0] != parts[0].flatten()[0]).any())


def _parts_written(first: Call, inside: list[Call]) -> int:
    """Number of parts n ≥ 2 where the last branch of a block writes 1/n of the state and no branch writes all of it."""
    branches = _branch_calls(first, inside)
    if not branches:
        return 1
    # The last branch is an MLP or an output projection, which writes to the state; earlier ones may be projections inside.
    parts = _num_parts(branches[-1].y_shape, first.x_shape)
    if parts == 1:
        return 1
    complete = [call for call in branches if call.y_shape == first.x_shape]
    return 1 if any(_num_parts(call.x_shape, first.x_shape) != parts for call in complete) else parts


def _branch_calls(block: Call, inside: list[Call]) -> list[Call]:
    """The block's own calls of modules that have matrices; where one module only wraps the block, those inside it."""
    own = [call for call in inside if call.parent is block and _has_matrix(call.module)]
    if len(own) == 1 and own[0].x_shape == own[0].y_shape == block.x_shape:
        return _branch_calls(own[0], inside) or own
    return own


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _num_parts(shape: Sequence[int], state: Sequence[int]) -> int:
    """How many parts of this shape make up a state, along its last axis or its second one; 1 where none do."""
    if len(state) == 3 and tuple(shape) == (state[0], state[2]) and 1 < state[1] <= MAX_STREAMS:
        return state[1]
    for axis in {len(state) - 1, 1} if len(shape) == len(state) else ():
        count, remainder = divmod(state[axis], shape[axis])
        alike = all(a == b for i, (a, b) in enumerate(zip(shape, state, strict=True)) if i != axis)
        if alike and not remainder and 1 < count <= MAX_STREAMS:
            return count
    return 1
