"""What is true of a network? It writes it down itself in its forward; while nobody listens, nothing is computed.

Every value is kept as (B, T, n, D): sequences, tokens, streams, features. Matrices are destination × source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from einops import rearrange

Tensor = torch.Tensor


@dataclass
class State:
    """One state: each of ``ways`` is a true reading of it, all of its tensors together; ``mixes`` led to it."""

    ways: list[tuple[Tensor, ...]]
    mixes: list[Tensor]


@dataclass
class Truth:
    """States by memory, in the order of depth, and what looks like a state and is none."""

    chains: dict[str, list[State]] = field(default_factory=dict)
    decoys: list[Tensor] = field(default_factory=list)


_listening: list[Truth] = []


@contextmanager
def listening() -> Iterator[Truth]:
    _listening.append(Truth())
    try:
        yield _listening[-1]
    finally:
        _listening.pop()


def state(x, axes: str = "b t d", *, also=(), mixes=(), chain: str = "", **sizes: int) -> None:
    """What the next block reads from; ``also`` has other true readings, a tuple where it takes several tensors."""
    if _listening:
        ways = [way if isinstance(way, tuple) else (way,) for way in (x, *also)]
        values = [tuple(_value(part, axes, sizes) for part in way) for way in ways]
        matrices = [(of() if callable(of) else of).detach().clone().float() for of in mixes]
        _listening[-1].chains.setdefault(chain, []).append(State(values, matrices))


def step(matrix, x, axes: str = "b t n d", **sizes) -> None:
    """A state of several streams, and the matrix that led to it; several in a tuple are true alike."""
    state(x, axes, mixes=matrix if isinstance(matrix, tuple) else (matrix,), **sizes)


def decoy(x: Tensor) -> None:
    """What is computed and is no state."""
    if _listening:
        _listening[-1].decoys.append(_value(x, "b t d", {}))


def _value(x, axes: str, sizes: dict[str, int]) -> Tensor:
    x = x() if callable(x) and not isinstance(x, torch.Tensor) else x
    if isinstance(x, (list, dict)):
        x, axes = torch.stack([*x.values()] if isinstance(x, dict) else x, 2), "b t n d"
    right = "b (h w) 1 d" if "h" in axes else "b t n d" if "n" in axes else "b t 1 d"
    return rearrange(x.detach().clone().float(), f"{axes} -> {right}", **sizes)
