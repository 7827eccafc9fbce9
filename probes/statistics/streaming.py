"""Moments of second order over every real token, in one pass and in memory that no number of batches enlarges.

Shapes: B batch, T token, t = B T, N stream, V view of the streams (their mean, then each of several), D feature. A forward's
tokens wait until there are enough for one product; then they are added, and the mean's also go into the sketch. Tokens that
are not finite at some depth are left out at all, and counted. Where only one sequence in so many is streamed, the numbers of
the sequences decide which, so that every depth, batch and process agrees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.statistics.depth_sketch import (
    Growing,
    Places,
    Sketch,
    hashed,
    joined,
    placed,
    scores,
    token_index,
)
from depthscope.probes.statistics.second_moments import Block, Moments, added, together

# Bytes of one depth's sums: all streams' beyond the first limit are left out, one view's beyond the second refused.
ALL_STREAMS, ONE_VIEW = 2**25, 2**28
TINY, HUGE = -126, 127  # exponents of float32
MEAN = 0  # the view

Key = TypeVar("Key")
Value = TypeVar("Value")
Summed = TypeVar("Summed", Moments, Sketch)


class View(NamedTuple):
    """The tokens of a forward at one depth, less a shift and over a size: the mean over streams, or one stream."""

    signed_tD: torch.Tensor  # float32, or float64 where products are to be exact; a random sign to each token
    shift_D: torch.Tensor


class Drawn(NamedTuple):
    """The sequences of a forward that are looked at; its depths share them."""

    sequences: torch.Tensor | None  # positions in the batch; None for all
    index_t: torch.Tensor
    sign_t: torch.Tensor


class Held(NamedTuple):
    """One depth of the present forward, kept until its end: which tokens are left out is known only then."""

    shape: torch.Size
    views: list[View]
    size: torch.Tensor
    real_t: torch.Tensor | None
    drawn: Drawn


class Part(NamedTuple):
    """Some depths of one width of a whole forward, waiting to be added."""

    states: tuple[Held, ...]
    places: Places
    square_L: torch.Tensor  # Σ of squared deviations, over the size, float64
    lost: torch.Tensor  # tokens that are not finite at some depth
    clean: bool  # nothing is known not to be finite, padding included


class Streaming:
    """The moments of every depth and the sketches over depths of one chain.

    Parameters
    ----------
    first_index : int
        Index of the first sequence of the forward that is to be seen.
    every : int
        One sequence in so many is looked at: see `is_drawn`.
    """

    def __init__(self, first_index: int = 0, every: int = 1) -> None:
        self.first_index, self.every = first_index, every
        self.moments: dict[tuple[int, int], Moments] = {}  # by depth and view
        self.sketches: dict[tuple[int, ...], Sketch] = {}  # by depths
        self.left_out: dict[tuple[int, ...], torch.Tensor] = {}
        self.sequences: tuple[
            tuple[int, int], ...
        ] = ()  # first and behind the last, of those in the sketches
        self.num_streams = 1
        self.unseen_streams = ""  # why streams one by one are not
        self._waiting: dict[tuple[int, ...], tuple[Part, ...]] = {}
        self._held: dict[int, Held] = {}
        self._drawn: dict[tuple[torch.Size, torch.device], Drawn] = {}

    def see_state(
        self,
        depth: int,
        state_BTND: torch.Tensor,
        mask_BT: torch.Tensor | None,
        mean_ND: torch.Tensor,
        largest_tN: torch.Tensor,
    ) -> None:
        """Look at one state.

        Parameters
        ----------
        depth : int
            Depth index.
        state_BTND : Tensor
            The canonical state.
        mask_BT : Tensor or None
            True on real tokens; None where all are real.
        mean_ND : Tensor
            The mean of its real tokens, which products are taken about; not finite where one of them is not.
        largest_tN : Tensor
            The largest size of each token's features; 0 on padding.

        Raises
        ------
        CaptureError
            Where the state is too wide for moments of second order.
        """
        shape, state = state_BTND.shape, state_BTND.detach()
        _require_room(shape[3])
        self.num_streams = shape[2]
        finite_t = largest_tN.isfinite().all(1)
        size = _size(torch.where(finite_t[:, None], largest_tN, 0.0).amax())
        good_t = finite_t if mask_BT is None else finite_t & mask_BT.flatten()
        wanted = torch.float64 if _exactly(depth) else torch.float32
        shift_ND = _shift(state, mean_ND, good_t).to(torch.promote_types(state.dtype, wanted))
        drawn = self._draw(shape, state.device)
        if drawn.sequences is not None:
            state = state[drawn.sequences]
            mask_BT = None if mask_BT is None else mask_BT[drawn.sequences]
        real_t = None if mask_BT is None else mask_BT.flatten()
        sign_t = drawn.sign_t * size.reciprocal()
        sign_t = (sign_t if real_t is None else sign_t * real_t).to(shift_ND.dtype)
        near = torch.sub(state.flatten(0, 1), shift_ND)  # exact where offsets are large
        near = near.mul_(sign_t[:, None, None]).to(wanted)
        mean = near.mean(1) if shape[2] > 1 else near.squeeze(1)
        views = [View(mean, shift_ND.double().mean(0))]
        if shape[2] > 1 and not self._leaves_streams(shape):
            views += [View(near[:, i].contiguous(), shift_ND[i].double()) for i in range(shape[2])]
        self._held[depth] = Held(shape, views, size, real_t, drawn)

    def _draw(self, shape: torch.Size, device: torch.device) -> Drawn:
        """The same for every depth of a forward."""
        key = shape[:2], device
        if key not in self._drawn:
            places = [i for i in range(shape[0]) if is_drawn(self.first_index + i, self.every)]
            sequences = torch.tensor(places, dtype=torch.long, device=device)
            index_t = token_index(sequences + self.first_index, shape[1])
            some = None if len(places) == shape[0] else sequences
            self._drawn[key] = Drawn(some, index_t, hashed(index_t)[1])
        return self._drawn[key]

    def _leaves_streams(self, shape: torch.Size) -> bool:
        needed = shape[2] * shape[3] ** 2 * 8
        if needed <= ALL_STREAMS:
            return False
        self.unseen_streams = (
            f"the sums of {shape[2]} streams of {shape[3]} features take {needed / 2**20:.0f} MiB a depth, "
            f"more than {ALL_STREAMS / 2**20:.0f}: only their mean was streamed"
        )
        return True

    def end_forward(self) -> None:
        """Let the depths of the forward wait together, those of each width and number of tokens by themselves."""
        for _, stage in groupby(sorted(self._held), key=lambda depth: self._held[depth].shape):
            depths = tuple(stage)
            states = [self._held[depth] for depth in depths]
            self._waiting[depths] = (_part(states),)
            self.sequences = ((self.first_index, self.first_index + states[0].shape[0]),)
        self._held.clear()
        self._drawn.clear()

    def joined(self, other: Streaming) -> Streaming:
        """What both have seen; neither is written.

        Parameters
        ----------
        other : Streaming
            Of the same chain, over other tokens.

        Returns
        -------
        Streaming
        """
        both = Streaming(every=self.every)
        both.add(self)
        both.add(other)
        return both

    def add(self, other: Streaming) -> None:
        """Add what another has seen, which is not written; nor is it kept, but for tokens that wait.

        Parameters
        ----------
        other : Streaming
            Of the same chain, over other tokens.
        """
        self.num_streams = max(self.num_streams, other.num_streams)
        self.every = max(self.every, other.every)
        self.unseen_streams = self.unseen_streams or other.unseen_streams
        self.moments = _joined(self.moments, _apart(other.moments, self.moments), together)
        self.sketches = _joined(self.sketches, _apart(other.sketches, self.sketches), joined)
        self.sequences = _spans(self.sequences + other.sequences)
        self.left_out = _joined(self.left_out, other.left_out, torch.add)
        self._waiting = _joined(self._waiting, other._waiting, lambda a, b: a + b)
        self._add_waiting([depths for depths, parts in self._waiting.items() if _enough(parts)])

    def settled(self) -> Streaming:
        """The same with nothing waiting.

        Returns
        -------
        Streaming
        """
        if not self._waiting:
            return self
        whole = Streaming()
        whole.add(self)
        whole._add_waiting(list(whole._waiting))
        return whole

    def sketch_of(self, depths: Sequence[int]) -> Sketch | None:
        """The sketch of some depths.

        Parameters
        ----------
        depths : sequence of int
            The depths; nothing of theirs waits.

        Returns
        -------
        Sketch or None
            None where no sketch has seen every token of theirs: they were not always of one width and number of tokens.
        """
        key = next((key for key in self.sketches if set(depths) <= set(key)), None)
        if key is None or float(self.sketches[key].count) != float(self.moments[depths[0], MEAN].count):
            return None
        sketch = self.sketches[key]
        if tuple(depths) == key:
            return self.sketches[key]
        places = torch.tensor([key.index(depth) for depth in depths], device=sketch.signs_m.device)
        by_depth = ("mean_LD", "trace_L", "buckets_LmD", "heavy_LhD")
        return sketch._replace(**{name: getattr(sketch, name)[places] for name in by_depth})

    def _add_waiting(self, stages: Iterable[tuple[int, ...]]) -> None:
        """Add what waits at some depths."""
        for depths in stages:
            parts = self._waiting.pop(depths)
            width = parts[0].states[0].shape[3]
            growing = Growing(self.sketches.get(depths), [part.places for part in parts], len(depths), width)
            for position, depth in enumerate(depths):
                block = self._add_moments(depth, parts, position)
                growing.add(position, block, _squares(parts, position))
            self.sketches[depths] = growing.sketch
            for part in parts:
                self.left_out = _joined(self.left_out, {depths: part.lost}, torch.add)

    def _add_moments(self, depth: int, parts: tuple[Part, ...], position: int) -> Block:
        """Add the views of one depth to the moments; the mean's tokens."""
        for view in reversed(range(len(parts[0].states[position].views))):
            block = _block(parts, position, view)
            self.moments[depth, view] = added(self.moments.get((depth, view)), block)
        return block  # the mean's, which comes last


def is_drawn(sequence: int, every: int) -> bool:
    """Whether a sequence is the one in ``every`` that is taken: one of each so many that follow each other, at random.

    Parameters
    ----------
    sequence : int
        Its index.
    every : int
        How many share one.

    Returns
    -------
    bool
    """
    return every == 1 or sequence % every == random.Random(sequence // every).randrange(every)


def _require_room(width: int) -> None:
    if width**2 * 8 > ONE_VIEW:
        raise CaptureError(
            f"streaming would keep {width**2 * 8 / 2**20:.0f} MiB at each depth for {width} features, more than "
            f"{ONE_VIEW / 2**20:.0f}: capture without streaming=True, and read the metrics of the sampled tokens"
        )


def _size(largest: torch.Tensor) -> torch.Tensor:
    """The power of two above a size, float32."""
    exponent = torch.frexp(largest)[1].clamp(TINY, HUGE)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _shift(state_BTND: torch.Tensor, mean_ND: torch.Tensor, good_t: torch.Tensor) -> torch.Tensor:
    """The mean; the last good token in its place where it is not finite, or else 0."""
    last = (good_t * torch.arange(len(good_t), device=good_t.device)).argmax()
    token_ND = state_BTND.flatten(0, 1)[last[None]].squeeze(0)
    return torch.where(mean_ND.isfinite(), mean_ND, token_ND.double()).nan_to_num(0.0, 0.0, 0.0)


def _part(states: list[Held]) -> Part:
    """What the depths of a stage show together: which tokens are left out, and which are heavy."""
    rows = [held.views[MEAN].signed_tD for held in states]
    near, drawn, masked_t = rows[0].device, states[0].drawn, states[0].real_t
    norm_Lt = torch.stack([torch.linalg.vector_norm(x_tD, dim=1).to(near, torch.float32) for x_tD in rows])
    finite_t = norm_Lt.isfinite().all(0)
    real_t = finite_t if masked_t is None else masked_t & finite_t
    left_out = ~finite_t if masked_t is None else masked_t & ~finite_t
    known = near.type == "cpu" and bool(finite_t.all())  # elsewhere asking would wait for the device
    places = placed(drawn.index_t, real_t, scores(norm_Lt, real_t))
    square_L = torch.where(real_t, norm_Lt, 0.0).double().square().sum(1)
    return Part(tuple(states), places, square_L, left_out.sum(), known)


def _enough(parts: tuple[Part, ...]) -> bool:
    """Whether the tokens that wait are as many numbers as the sums that they go into."""
    width = parts[0].states[0].shape[3]
    return sum(len(part.places.real_t) for part in parts) >= 2 * width


def _exactly(depth: int) -> bool:
    """Float64 for embeddings, where equal words are equal tokens, and where the user lets float32 be rounded further."""
    return depth == 0 or torch.get_float32_matmul_precision() != "highest"


def _squares(parts: tuple[Part, ...], position: int) -> torch.Tensor:
    """Σ ‖x − shift‖² of one depth of each forward."""
    size = torch.stack([part.states[position].size for part in parts]).double()
    return torch.stack([part.square_L[position].to(size.device) for part in parts]) * size.square()


def _block(parts: tuple[Part, ...], position: int, view: int) -> Block:
    """The tokens of one view that wait at a depth, forward by forward."""
    states = [part.states[position] for part in parts]
    views = [state.views[view] for state in states]
    signed, near = [seen.signed_tD for seen in views], views[0].signed_tD.device
    reals = [part.places.real_t.to(near) for part in parts]
    signs = [part.places.sign_t.to(near, signed[0].dtype) for part in parts]
    sizes = torch.stack([state.size for state in states])
    size = sizes.amax()
    signed = [
        x_tD if part.clean else _without(x_tD, real)
        for x_tD, real, part in zip(signed, reals, parts, strict=True)
    ]
    if not (near.type == "cpu" and bool((sizes == size).all())):
        shares = (sizes / size).to(signed[0].dtype)
        signed = [x_tD * share for x_tD, share in zip(signed, shares, strict=True)]
    total = torch.stack([sign_t @ x_tD for sign_t, x_tD in zip(signs, signed, strict=True)])
    return Block(
        signed=signed,
        signs=signs,
        count_k=torch.stack([real.sum() for real in reals]).double(),
        shift_kD=torch.stack([seen.shift_D for seen in views]),
        total_kD=total.double() * size,
        size=size.double(),
    )


def _without(x_tD: torch.Tensor, real_t: torch.Tensor) -> torch.Tensor:
    """Zero what is not real, by its bits: NaN times zero is NaN."""
    bits = x_tD.view(torch.int32 if x_tD.dtype == torch.float32 else torch.int64)
    return (bits & real_t.to(bits.dtype).neg()[:, None]).view(x_tD.dtype)


def _apart(of: dict[Key, Summed], held: dict[Key, Summed]) -> dict[Key, Summed]:
    """What is to be held in memory of its own, since it will be written: copies, where nothing is held."""
    return {key: value if key in held else _copied(value) for key, value in of.items()}


def _copied(value: Summed) -> Summed:
    parts = (part.clone() if isinstance(part, torch.Tensor) else part for part in value)
    return type(value)(*parts)


def _joined(
    a: dict[Key, Value], b: dict[Key, Value], rule: Callable[[Value, Value], Value]
) -> dict[Key, Value]:
    """Both, what is in both by the rule."""
    return a | b | {key: rule(a[key], b[key]) for key in a.keys() & b.keys()}


def _spans(spans: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same numbers in as few spans as there are."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        if found and first == found[-1][1]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return tuple(found)
