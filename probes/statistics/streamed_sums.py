"""What are the second moments of every real token, in one pass and in constant memory? Moments by depth, sketches over depths.

Shapes: B batch, T token, t = B T, N stream, V view of the streams (their mean, then each of several), D feature, L depth. The
tokens of a forward are buffered until there are enough for one product; then they are added to the moments, and the mean over
streams also to the sketch. Tokens that are not finite at some depth are left out at every depth, and counted. Where only one
sequence in so many is streamed, the numbers of the sequences decide which, so that every depth, batch and process agrees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.statistics.depth_sketch import (
    Sketch,
    SketchUpdate,
    TokenPlacement,
    bucket_and_sign,
    heaviness,
    merge_sketches,
    place_tokens,
    token_index,
)
from depthscope.probes.statistics.second_moments import Moments, TokenBlock, add_block, merge_moments

# Bytes of one depth's scatter matrices, heuristics of ours: beyond the first the streams one by one are left out (32 MiB:
# 4 streams of 1024 features), beyond the second a state is refused (256 MiB: 5792 features).
ALL_STREAMS_BYTES, ONE_VIEW_BYTES = 2**25, 2**28
MIN_EXPONENT, MAX_EXPONENT = -126, 127  # of normal float32 numbers
MEAN = 0  # the view that is the mean over streams

Key = TypeVar("Key")
Value = TypeVar("Value")
Summed = TypeVar("Summed", Moments, Sketch)


class _View(NamedTuple):
    """The tokens of a forward at one depth, of the mean over streams or of one stream: sign · (x − shift) / size."""

    signed_tD: torch.Tensor  # float32, or float64 where the products must be exact
    shift_D: torch.Tensor


class _DrawnSequences(NamedTuple):
    """The sequences of a forward that are streamed, the same at every depth."""

    positions: torch.Tensor | None  # in the batch; None for all
    index_t: torch.Tensor
    sign_t: torch.Tensor


class _State(NamedTuple):
    """One depth of the present forward; which of its tokens are left out is known only after the last depth."""

    shape: torch.Size
    views: list[_View]
    size: torch.Tensor
    real_t: torch.Tensor | None
    drawn: _DrawnSequences


class _Buffered(NamedTuple):
    """Some depths of one width of a complete forward, which wait to be added."""

    states: tuple[_State, ...]
    placement: TokenPlacement
    square_L: torch.Tensor  # Σ ‖x − shift‖² / size², float64
    num_left_out: torch.Tensor  # tokens that are not finite at some depth
    all_finite: bool  # known without waiting for the device, padding included


class StreamedSums:
    """The moments of every depth and the sketches over depths of one chain.

    ``first_index``: index of the first sequence of the forward to come.
    ``every``: one sequence in so many is streamed: see `is_drawn`.
    """

    def __init__(self, first_index: int = 0, every: int = 1) -> None:
        self.first_index, self.every = first_index, every
        self.moments: dict[tuple[int, int], Moments] = {}  # by depth and view
        self.sketches: dict[tuple[int, ...], Sketch] = {}  # by depths
        self.left_out: dict[tuple[int, ...], torch.Tensor] = {}  # number of tokens, by depths
        # Half-open ranges of the sequences in the sketches: merging two with the same sequences would be wrong.
        self.sequences: tuple[tuple[int, int], ...] = ()
        self.num_streams = 1
        self.streams_left_out = ""  # the reason, where streams one by one are left out
        self._buffer: dict[tuple[int, ...], tuple[_Buffered, ...]] = {}
        self._states: dict[int, _State] = {}  # of the present forward, by depth
        self._drawn: dict[tuple[torch.Size, torch.device], _DrawnSequences] = {}  # of the present forward

    def add_state(
        self,
        depth: int,
        state_BTND: torch.Tensor,
        mask_BT: torch.Tensor | None,
        mean_ND: torch.Tensor,
        largest_tN: torch.Tensor,
    ) -> None:
        """Add one state.

        ``mask_BT``: true on real tokens; None where all are real.
        ``mean_ND``: the mean of its real tokens, about which products are taken; not finite where one of them is not.
        ``largest_tN``: the largest absolute feature of each token; 0 on padding.
        """
        shape, state = state_BTND.shape, state_BTND.detach()
        _require_memory(shape[3])
        self.num_streams = shape[2]
        finite_t = largest_tN.isfinite().all(1)
        size = _power_of_two_above(torch.where(finite_t[:, None], largest_tN, 0.0).amax())
        usable_t = finite_t if mask_BT is None else finite_t & mask_BT.flatten()
        dtype = torch.float64 if _needs_float64(depth) else torch.float32
        shift_ND = _shift(state, mean_ND, usable_t).to(torch.promote_types(state.dtype, dtype))
        drawn = self._draw(shape, state.device)
        if drawn.positions is not None:
            state = state[drawn.positions]
            mask_BT = None if mask_BT is None else mask_BT[drawn.positions]
        real_t = None if mask_BT is None else mask_BT.flatten()
        sign_t = drawn.sign_t * size.reciprocal()
        sign_t = (sign_t if real_t is None else sign_t * real_t).to(shift_ND.dtype)
        # First the shift: numbers near each other subtract exactly, so that a large common offset costs no digits.
        signed = torch.sub(state.flatten(0, 1), shift_ND)
        signed = signed.mul_(sign_t[:, None, None]).to(dtype)
        mean = signed.mean(1) if shape[2] > 1 else signed.squeeze(1)
        views = [_View(mean, shift_ND.double().mean(0))]
        if shape[2] > 1 and self._streams_fit(shape):
            views += [_View(signed[:, i].contiguous(), shift_ND[i].double()) for i in range(shape[2])]
        self._states[depth] = _State(shape, views, size, real_t, drawn)

    def _draw(self, shape: torch.Size, device: torch.device) -> _DrawnSequences:
        """Choose the sequences to stream, once per forward, number of tokens and device."""
        key = shape[:2], device
        if key not in self._drawn:
            positions = [i for i in range(shape[0]) if is_drawn(self.first_index + i, self.every)]
            sequences = torch.tensor(positions, dtype=torch.long, device=device)
            index_t = token_index(sequences + self.first_index, shape[1])
            subset = None if len(positions) == shape[0] else sequences
            self._drawn[key] = _DrawnSequences(subset, index_t, bucket_and_sign(index_t)[1])
        return self._drawn[key]

    def _streams_fit(self, shape: torch.Size) -> bool:
        needed = shape[2] * shape[3] ** 2 * 8
        if needed <= ALL_STREAMS_BYTES:
            return True
        self.streams_left_out = (
            f"the sums of {shape[2]} streams of {shape[3]} features take {needed / 2**20:.0f} MiB per depth, "
            f"more than {ALL_STREAMS_BYTES / 2**20:.0f}: only their mean was streamed"
        )
        return False

    def end_forward(self) -> None:
        """Buffer the depths of the forward; consecutive ones of the same shape share a sketch."""
        for _, stage in groupby(sorted(self._states), key=lambda depth: self._states[depth].shape):
            depths = tuple(stage)
            states = [self._states[depth] for depth in depths]
            self._buffer[depths] = (_buffered(states),)
            self.sequences = ((self.first_index, self.first_index + states[0].shape[0]),)
        self._states.clear()
        self._drawn.clear()

    def merged_with(self, other: StreamedSums) -> StreamedSums:
        """The sums of both, over different tokens of one chain; neither is overwritten."""
        both = StreamedSums(every=self.every)
        both.add(self)
        both.add(other)
        return both

    def add(self, other: StreamedSums) -> None:
        """Add the sums of other tokens, without overwriting them; only buffered tokens are shared afterwards."""
        self.num_streams = max(self.num_streams, other.num_streams)
        self.every = max(self.every, other.every)
        self.streams_left_out = self.streams_left_out or other.streams_left_out
        self.moments = _merged(self.moments, _copies_of_new(other.moments, self.moments), merge_moments)
        self.sketches = _merged(self.sketches, _copies_of_new(other.sketches, self.sketches), merge_sketches)
        self.sequences = _merged_ranges(self.sequences + other.sequences)
        self.left_out = _merged(self.left_out, other.left_out, torch.add)
        self._buffer = _merged(self._buffer, other._buffer, lambda a, b: a + b)
        self._add_buffered([depths for depths, buffered in self._buffer.items() if _buffer_is_full(buffered)])

    def flushed(self) -> StreamedSums:
        """The same sums with every buffered token added; itself where nothing is buffered."""
        if not self._buffer:
            return self
        flushed = StreamedSums()
        flushed.add(self)
        flushed._add_buffered(list(flushed._buffer))
        return flushed

    def sketch_of(self, depths: Sequence[int]) -> Sketch | None:
        """The sketch of some depths, of which nothing may be buffered.

        None where no sketch has every token of theirs: their width or number of tokens differed in some forward.
        """
        key = next((key for key in self.sketches if set(depths) <= set(key)), None)
        if key is None or float(self.sketches[key].count) != float(self.moments[depths[0], MEAN].count):
            return None
        sketch = self.sketches[key]
        if tuple(depths) == key:
            return sketch
        positions = torch.tensor([key.index(depth) for depth in depths], device=sketch.signs_m.device)
        by_depth = ("mean_LD", "trace_L", "buckets_LmD", "heavy_LhD")
        return sketch._replace(**{name: getattr(sketch, name)[positions] for name in by_depth})

    def _add_buffered(self, stages: Iterable[tuple[int, ...]]) -> None:
        """Add the buffered tokens of some stages to the moments and to the sketches."""
        for depths in stages:
            buffered = self._buffer.pop(depths)
            width = buffered[0].states[0].shape[3]
            placements = [part.placement for part in buffered]
            update = SketchUpdate(self.sketches.get(depths), placements, len(depths), width)
            for position, depth in enumerate(depths):
                block = self._add_moments(depth, buffered, position)
                update.add_depth(position, block, _square_sums(buffered, position))
            self.sketches[depths] = update.sketch
            for part in buffered:
                self.left_out = _merged(self.left_out, {depths: part.num_left_out}, torch.add)

    def _add_moments(self, depth: int, buffered: tuple[_Buffered, ...], position: int) -> TokenBlock:
        """Add every view of one depth to its moments; returns the tokens of the mean over streams."""
        num_views = len(buffered[0].states[position].views)
        for view in reversed(range(num_views)):  # the mean last, since its block goes on to the sketch
            block = _joined_block(buffered, position, view)
            self.moments[depth, view] = add_block(self.moments.get((depth, view)), block)
        return block


def is_drawn(sequence: int, every: int) -> bool:
    """Whether a sequence is streamed where only one in ``every`` is: of each group of that many, one at random."""
    # By the group's number alone, so that all processes agree. Not every n-th sequence: data may be periodic.
    return every == 1 or sequence % every == random.Random(sequence // every).randrange(every)


def _require_memory(width: int) -> None:
    if width**2 * 8 > ONE_VIEW_BYTES:
        raise CaptureError(
            f"streaming would keep {width**2 * 8 / 2**20:.0f} MiB at each depth for {width} features, more than "
            f"{ONE_VIEW_BYTES / 2**20:.0f}: capture without streaming=True, and read the metrics of the sampled tokens"
        )


def _power_of_two_above(largest: torch.Tensor) -> torch.Tensor:
    """The power of two above a number, float32: dividing by it rounds nothing, and squares do not overflow."""
    exponent = torch.frexp(largest)[1].clamp(MIN_EXPONENT, MAX_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _shift(state_BTND: torch.Tensor, mean_ND: torch.Tensor, usable_t: torch.Tensor) -> torch.Tensor:
    """The mean; where it is not finite the last usable token, which is as near to the others, or else 0."""
    last = (usable_t * torch.arange(len(usable_t), device=usable_t.device)).argmax()
    token_ND = state_BTND.flatten(0, 1)[last[None]].squeeze(0)
    return torch.where(mean_ND.isfinite(), mean_ND, token_ND.double()).nan_to_num(0.0, 0.0, 0.0)


def _buffered(states: list[_State]) -> _Buffered:
    """Join the depths of a stage: only together they show which tokens are left out, and which are heavy."""
    views = [state.views[MEAN].signed_tD for state in states]
    device, drawn, masked_t = views[0].device, states[0].drawn, states[0].real_t
    norm_Lt = torch.stack([torch.linalg.vector_norm(x_tD, dim=1).to(device, torch.float32) for x_tD in views])
    finite_t = norm_Lt.isfinite().all(0)
    real_t = finite_t if masked_t is None else masked_t & finite_t
    left_out = ~finite_t if masked_t is None else masked_t & ~finite_t
    all_finite = device.type == "cpu" and bool(finite_t.all())  # on a GPU bool() would wait for the device
    placement = place_tokens(drawn.index_t, real_t, heaviness(norm_Lt, real_t))
    square_L = torch.where(real_t, norm_Lt, 0.0).double().square().sum(1)
    return _Buffered(tuple(states), placement, square_L, left_out.sum(), all_finite)


def _buffer_is_full(buffered: tuple[_Buffered, ...]) -> bool:
    """Whether the buffered tokens are as many bytes as the scatter matrix that they are added to: 4 t D ≥ 8 D²."""
    # So the buffer at most doubles the memory, and writing the matrix is spread over as many tokens as that allows.
    width = buffered[0].states[0].shape[3]
    return sum(len(part.placement.real_t) for part in buffered) >= 2 * width


def _needs_float64(depth: int) -> bool:
    # Embeddings: equal words are equal tokens, so that a covariance of few words has exact zeros among its eigenvalues, which
    # float32 products would blur. And where the user allows TF32 or bfloat16 in float32 products.
    return depth == 0 or torch.get_float32_matmul_precision() != "highest"


def _square_sums(buffered: tuple[_Buffered, ...], position: int) -> torch.Tensor:
    """Σ ‖x − shift‖² of one depth of each forward."""
    size = torch.stack([part.states[position].size for part in buffered]).double()
    return torch.stack([part.square_L[position].to(size.device) for part in buffered]) * size.square()


def _joined_block(buffered: tuple[_Buffered, ...], position: int, view: int) -> TokenBlock:
    """The buffered tokens of one view at one depth, forward by forward, over a common size."""
    states = [part.states[position] for part in buffered]
    views = [state.views[view] for state in states]
    device, dtype = views[0].signed_tD.device, views[0].signed_tD.dtype
    reals = [part.placement.real_t.to(device) for part in buffered]
    signs = [part.placement.sign_t.to(device, dtype) for part in buffered]
    sizes = torch.stack([state.size for state in states])
    size = sizes.amax()
    signed = [
        seen.signed_tD if part.all_finite else _zero_unreal(seen.signed_tD, real)
        for seen, real, part in zip(views, reals, buffered, strict=True)
    ]
    # On a CPU the product with ones is spared; on a GPU comparing would wait for the device.
    if not (device.type == "cpu" and bool((sizes == size).all())):
        shares = (sizes / size).to(dtype)
        signed = [x_tD * share for x_tD, share in zip(signed, shares, strict=True)]
    total = torch.stack([sign_t @ x_tD for sign_t, x_tD in zip(signs, signed, strict=True)])
    return TokenBlock(
        signed=signed,
        signs=signs,
        count_k=torch.stack([real.sum() for real in reals]).double(),
        shift_kD=torch.stack([seen.shift_D for seen in views]),
        total_kD=total.double() * size,
        size=size.double(),
    )


def _zero_unreal(x_tD: torch.Tensor, real_t: torch.Tensor) -> torch.Tensor:
    """Zero the tokens that are not real."""
    # By a bit mask (all ones or all zeros), since NaN times zero is NaN.
    bits = x_tD.view(torch.int32 if x_tD.dtype == torch.float32 else torch.int64)
    return (bits & real_t.to(bits.dtype).neg()[:, None]).view(x_tD.dtype)


def _copies_of_new(other: dict[Key, Summed], own: dict[Key, Summed]) -> dict[Key, Summed]:
    """The other's sums, copied where there are none of our own: what is taken over will be overwritten."""
    return {key: value if key in own else _cloned(value) for key, value in other.items()}


def _cloned(value: Summed) -> Summed:
    parts = (part.clone() if isinstance(part, torch.Tensor) else part for part in value)
    return type(value)(*parts)


def _merged(
    a: dict[Key, Value], b: dict[Key, Value], merge: Callable[[Value, Value], Value]
) -> dict[Key, Value]:
    """The entries of both, merged where a key is in both."""
    merged = dict(a)
    for key, value in b.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def _merged_ranges(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same numbers in as few half-open ranges as possible."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((first, end))
    return tuple(merged)
