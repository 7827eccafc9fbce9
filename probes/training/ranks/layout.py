"""Which statistics does a step have, in which order? A layout, which processes share that measure the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.run.statistics_dataset import GRADIENT, OF_HEADS
from depthscope.probes.session.logit_statistics import GRADIENT_SUMS
from depthscope.probes.statistics.live_sums import LiveSums, Places
from depthscope.probes.statistics.token_sums import TokenSums

SAMPLED = ("states", "gradient_norms", "mixes", "reads", "writes")
"""What `LiveSums` has of the sampled tokens, by depth or connection."""
OF_GRADIENTS = (GRADIENT, *GRADIENT_SUMS)
"""Sums of squared gradients, which depend on how the loss is normalised."""


class Entry(NamedTuple):
    """One tensor of the statistics of a step: which chain, which part of its sums, its name, and its depth or connection."""

    chain: int
    part: str
    name: str
    key: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"chain {self.chain}, {self.name} {self.key} of shape {self.shape}"


@dataclass(frozen=True)
class Layout:
    """Which statistics a step has, in the order of the vectors."""

    sums: tuple[Entry, ...]  # what is added
    maxima: tuple[Entry, ...]  # what combines by maximum
    values: tuple[Entry, ...]  # values of every token, whose distribution is added; shapes without the token
    samples: tuple[Entry, ...]  # of the sampled tokens, without the token
    # in which set of tokens each sample is: tokens of stages of different lengths are drawn separately
    sets: Mapping[Entry, int]
    most: int  # number of sampled tokens of all processes together
    dtypes: tuple[torch.dtype, ...]  # of the samples

    @property
    def num_sets(self) -> int:
        """Number of sets of sampled tokens."""
        return max(self.sets.values(), default=-1) + 1

    @property
    def sample_length(self) -> int:
        """Length of the vector of samples, in numbers of 32 bits."""
        of_samples = sum(
            prod(entry.shape) * dtype.itemsize // 4
            for entry, dtype in zip(self.samples, self.dtypes, strict=True)
        )
        return self.most * (of_samples + 2 * self.num_sets)

    def facts(self) -> list[str]:
        """The layout in sentences, the same in processes that can be added."""
        return [
            *map(str, (*self.sums, *self.maxima, *self.values)),
            *(
                f"{entry} of type {dtype} among the sampled tokens {self.sets[entry]}"
                for entry, dtype in zip(self.samples, self.dtypes, strict=True)
            ),
        ]


def digest(facts: Sequence[str]) -> int:
    """A number of 62 bits that two different lists of sentences do not share."""
    return int.from_bytes(hashlib.sha256("\n".join(facts).encode()).digest()[:8], "big") >> 2


def layout_of(sums: Sequence[TokenSums], most: int) -> Layout:
    """The layout of what one process measured.

    ``most``: number of sampled tokens; 0 for none.
    """
    added = [entry for entry, _ in summed(sums)]
    maxima = [
        Entry(chain, part, name, key, tuple(value.shape))
        for chain, part, of in _parts(sums)
        for name, by_key in of.maxima.items()
        for key, value in by_key.items()
    ]
    values = [
        Entry(chain, "live", name, key, tuple(value.shape[1:]))
        for chain, live in _live(sums)
        for name, by_key in live.values.items()
        for key, value in by_key.items()
    ]
    samples, dtypes, sets = [], [], {}
    known: list[tuple[int, Places]] = []
    for chain, live in _live(sums):
        for name in SAMPLED:
            for key, value in sorted(getattr(live, name).items()):
                entry = Entry(chain, "live", name, key, tuple(value.shape[1:]))
                place = place_of(live, name, key)
                position = next(
                    (at for at, (of, other) in enumerate(known) if of == chain and other is place), None
                )
                if position is None:
                    position = len(known)
                    known.append((chain, place))
                samples.append(entry)
                dtypes.append(value.dtype)
                sets[entry] = position
    return Layout(
        tuple(sorted(added)),
        tuple(sorted(maxima)),
        tuple(sorted(values)),
        tuple(samples),
        sets,
        most,
        tuple(dtypes),
    )


def place_of(live: LiveSums, name: str, key: int) -> Places:
    """The sampled tokens that a tensor is of; those of connections are the only ones that their chain has."""
    if name in ("states", "gradient_norms"):
        return live.places[key]
    places = list(live.places.values())
    if any(place is not places[0] for place in places):
        raise CaptureError(
            "a chain with stream connections changes its number of tokens; expected one number at every depth"
        )
    return places[0]


def _parts(sums: Sequence[TokenSums]) -> Iterator[tuple[int, str, TokenSums]]:
    for chain, of in enumerate(sums):
        yield chain, "streams", of
        if of.mean_view is not None:
            yield chain, "mean", of.mean_view


def _live(sums: Sequence[TokenSums]) -> Iterator[tuple[int, LiveSums]]:
    for chain, of in enumerate(sums):
        if of.live is not None:
            yield chain, of.live


def summed(sums: Sequence[TokenSums]) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Every tensor that is added over processes."""
    parts = [(chain, part, of.sums) for chain, part, of in _parts(sums)]
    parts += [(chain, "live", live.sums) for chain, live in _live(sums)]
    for chain, part, by_name in parts:
        for name, by_key in by_name.items():
            # How many sequences are looked at depends on the batch: the attention stays that of the first process.
            if name not in OF_HEADS:
                for key, value in by_key.items():
                    yield Entry(chain, part, name, key, tuple(value.shape)), value
