"""Moments of second order over every real token, in one pass and in memory that no number of batches enlarges.

Shapes: B batch, T token, t = B T, N stream, V view of the streams (their mean, then each of several), D feature. A forward's
tokens wait until there are enough for one product; then they are added, and the mean's also go into the sketch. Tokens that
are not finite at some depth are left out at all, and counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch

from probes.inputs import CaptureError
from probes.moments import Block, Moments, added, together, totals
from probes.sketch import Growing, Places, Sketch, joined, placed, scores, token_index

# Bytes of one depth's sums: all streams' beyond the first limit are left out, one view's beyond the second refused.
ALL_STREAMS, ONE_VIEW = 2**25, 2**28
TINY, HUGE = -126, 127  # exponents of float32
MEAN = 0  # the view

Key = TypeVar("Key")
Value = TypeVar("Value")
Summed = TypeVar("Summed", Moments, Sketch)


class View(NamedTuple):
    """The tokens of a forward at one depth, less a shift and over a size: all streams' mean, or one stream."""

    deviation_tD: torch.Tensor  # float32, or float64 where products are to be exact
    shift_D: torch.Tensor


class Held(NamedTuple):
    """One depth of the present forward, kept until its end: which tokens are left out is known only then."""

    shape: torch.Size
    views: list[View]
    size: torch.Tensor
    real_BT: torch.Tensor | None


class Part(NamedTuple):
    """Some depths of one width of a whole forward, waiting to be added."""

    states: tuple[Held, ...]
    real_t: torch.Tensor
    score_t: torch.Tensor
    index_t: torch.Tensor
    square_L: torch.Tensor  # Σ of squared deviations, over the size, float64
    rows: torch.Tensor | None  # tokens of the sequences whose moments are taken; None for all
    lost: torch.Tensor  # tokens that are not finite at some depth
    clean: bool  # nothing is known not to be finite, padding included


class Streaming:
    """The moments of every depth and the sketches over depths of one chain.

    Parameters
    ----------
    first_index : int
        Index of the first sequence of the forward that is to be seen.
    spectra_every : int
        Moments, which the spectra are of, are taken of one sequence in so many. The sketch is of all.
    """

    def __init__(self, first_index: int = 0, spectra_every: int = 1) -> None:
        self.first_index, self.spectra_every = first_index, spectra_every
        self.counts: dict[int, torch.Tensor] = {}  # tokens seen, by depth
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
        inverse = size.reciprocal().to(shift_ND.dtype)
        near = torch.addcmul(-shift_ND * inverse, state, inverse).to(wanted)  # exact where offsets are large
        mean = near.mean(2) if shape[2] > 1 else near.squeeze(2)
        views = [View(mean.flatten(0, 1), shift_ND.double().mean(0))]
        if shape[2] > 1 and not self._leaves_streams(shape):
            drawn = self._drawn(shape[0])
            some = near if drawn is None else near[torch.tensor(drawn, dtype=torch.long, device=near.device)]
            views += [View(some[:, :, i].flatten(0, 1), shift_ND[i].double()) for i in range(shape[2])]
        self._held[depth] = Held(shape, views, size, mask_BT)

    def _drawn(self, sequences: int) -> list[int] | None:
        """The sequences of the forward whose moments are taken; None for all."""
        if self.spectra_every == 1:
            return None
        return [i for i in range(sequences) if is_drawn(self.first_index + i, self.spectra_every)]

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
            part = _part(states, self.first_index, self._drawn(states[0].shape[0]))
            self._waiting[depths] = (part,)
            self.counts |= dict.fromkeys(depths, part.real_t.sum().double())
            self.sequences = ((self.first_index, self.first_index + part.states[0].shape[0]),)
        self._held.clear()

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
        both = Streaming(spectra_every=self.spectra_every)
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
        self.spectra_every = max(self.spectra_every, other.spectra_every)
        self.unseen_streams = self.unseen_streams or other.unseen_streams
        self.moments = _joined(self.moments, _apart(other.moments, self.moments), together)
        self.sketches = _joined(self.sketches, _apart(other.sketches, self.sketches), joined)
        self.sequences = _spans(self.sequences + other.sequences)
        self.counts = _joined(self.counts, other.counts, torch.add)
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
        if key is None or float(self.sketches[key].count) != float(self.counts[depths[0]]):
            return None
        sketch = self.sketches[key]
        places = torch.tensor([key.index(depth) for depth in depths], device=sketch.signs_m.device)
        by_depth = ("mean_LD", "trace_L", "buckets_LmD", "heavy_LhD")
        return sketch._replace(**{name: getattr(sketch, name)[places] for name in by_depth})

    def _add_waiting(self, stages: Iterable[tuple[int, ...]]) -> None:
        """Add what waits at some depths."""
        for depths in stages:
            parts = self._waiting.pop(depths)
            places = placed(
                torch.cat([part.index_t for part in parts]),
                torch.cat([part.real_t for part in parts]),
                torch.cat([part.score_t for part in parts]),
                tuple(len(part.index_t) for part in parts),
            )
            width = parts[0].states[0].shape[3]
            growing = Growing(self.sketches.get(depths), places, len(depths), width)
            for position, depth in enumerate(depths):
                block = _block(parts, position, MEAN, places)
                growing.add(position, block, _squares(parts, position))
                self._add_moments(depth, parts, position, places, block)
            self.sketches[depths] = growing.sketch
            for part in parts:
                self.left_out = _joined(self.left_out, {depths: part.lost}, torch.add)

    def _add_moments(
        self, depth: int, parts: tuple[Part, ...], position: int, places: Places, whole: Block
    ) -> None:
        """Add the views of one depth to the moments, of the sequences drawn; ``whole`` is of the mean and of all."""
        drawn = parts[0].rows is not None
        for view in range(len(parts[0].states[position].views)):
            block = (
                whole if view == MEAN and not drawn else _block(parts, position, view, places, drawn=drawn)
            )
            self.moments[depth, view] = added(self.moments.get((depth, view)), block)


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
    return sequence % every == random.Random(sequence // every).randrange(every)


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


def _part(states: list[Held], first_index: int, drawn: list[int] | None) -> Part:
    """What the depths of a stage show together: which tokens are left out, and which are heavy."""
    B, T, *_ = states[0].shape
    mask_BT, tokens = states[0].real_BT, states[0].views[MEAN].deviation_tD
    rows = [held.views[MEAN].deviation_tD for held in states]
    norms = [torch.linalg.vector_norm(x_tD, dim=1).to(tokens.device, torch.float32) for x_tD in rows]
    norm_Lt = torch.stack(norms)
    finite_t = norm_Lt.isfinite().all(0)
    masked_t = torch.ones_like(finite_t) if mask_BT is None else mask_BT.flatten()
    real_t = masked_t & finite_t
    known = tokens.device.type == "cpu" and bool(finite_t.all())  # elsewhere asking would wait for the device
    index_t = token_index(first_index, B, T, tokens.device)
    square_L = torch.where(real_t, norm_Lt, 0.0).double().square().sum(1)
    rows = None
    if drawn is not None:
        places = torch.arange(B * T).reshape(B, T)[drawn].flatten()
        rows = places.to(tokens.device)
    lost = (masked_t & ~finite_t).sum()
    return Part(tuple(states), real_t, scores(norm_Lt, real_t), index_t, square_L, rows, lost, known)


def _enough(parts: tuple[Part, ...]) -> bool:
    """Whether the tokens that wait are as many numbers as the sums that they go into."""
    width = parts[0].states[0].shape[3]
    return sum(len(part.index_t) for part in parts) >= 2 * width


def _exactly(depth: int) -> bool:
    """Float64 for embeddings, where equal words are equal tokens, and where the user lets float32 be rounded further."""
    return depth == 0 or torch.get_float32_matmul_precision() != "highest"


def _squares(parts: tuple[Part, ...], position: int) -> torch.Tensor:
    """Σ ‖x − shift‖² of one depth of each forward."""
    size = torch.stack([part.states[position].size for part in parts]).double()
    return torch.stack([part.square_L[position].to(size.device) for part in parts]) * size.square()


def _block(
    parts: tuple[Part, ...], position: int, view: int, places: Places, *, drawn: bool = False
) -> Block:
    """The tokens of one view that wait at a depth, one after another; those of the sequences drawn alone."""
    views = [part.states[position].views[view] for part in parts]
    near = views[0].deviation_tD.device
    signs, reals = places.sign_t.split(places.lengths), places.real_t.split(places.lengths)
    tokens = [seen.deviation_tD for seen in views]
    if drawn:
        chosen = [part.rows for part in parts]
        signs, reals = _rows(signs, chosen), _rows(reals, chosen)
        tokens = _rows(tokens, chosen) if view == MEAN else tokens
    lengths = [len(x_tD) for x_tD in tokens]
    sizes = torch.stack([part.states[position].size for part in parts])
    size = sizes.amax()
    sign_t = torch.cat(signs).to(near)
    signed_tD = tokens[0].new_empty(len(sign_t), tokens[0].shape[1])
    for out, x_tD, share, sign, real, part in zip(
        signed_tD.split(lengths), tokens, sizes / size, sign_t.split(lengths), reals, parts, strict=True
    ):
        torch.mul(x_tD, (sign * share).to(out.dtype)[:, None], out=out)
        if not part.clean:
            bits = out.view(torch.int32 if out.dtype == torch.float32 else torch.int64)
            bits.bitwise_and_(real.to(near, bits.dtype).neg()[:, None])  # NaN times zero is NaN
    sign_t = sign_t.to(signed_tD.dtype)
    return Block(
        signed_tD=signed_tD,
        sign_t=sign_t,
        count_k=torch.stack([real.sum() for real in reals]).double().to(near),
        shift_kD=torch.stack([seen.shift_D for seen in views]),
        total_kD=totals(signed_tD, sign_t, lengths) * size,
        size=size.double(),
    )


def _rows(parts: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [
        part if rows is None else part[rows.to(part.device)] for part, rows in zip(parts, chosen, strict=True)
    ]


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
