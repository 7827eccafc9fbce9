"""Where the states of a residual chain are seen, and what connects them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PLAIN = ("add", "normed")  # the styles of a plain block: state + branch, and a norm of that sum


@dataclass(frozen=True)
class Place:
    """Where one state of a chain is seen: at the input or the output of one call."""

    path: str
    index: int
    at: str  # "input" or "output"
    layer: int
    site: str
    module: str  # the module that produced the state
    method: str = "forward"
    item: int = 0  # which of the call's floating tensors


@dataclass(frozen=True)
class Link:
    """One connection: the call that mixes or adds, the call whose output is the branch's, and the depths it joins."""

    path: str
    index: int
    layer: int
    branch: str
    branch_path: str | None
    branch_index: int
    style: str
    depth_in: int
    depth_out: int


@dataclass(frozen=True)
class Chain:
    """A residual chain: the places of its states in depth order and, where they are known, its connections."""

    name: str
    places: tuple[Place, ...]
    links: tuple[Link, ...]
    blocks: tuple[str, ...]
    block_class: str
    shapes: tuple[tuple[int, ...], ...]
    final: Place | None = None  # behind the last norm
    history: bool = False  # connected to earlier depths, not to streams

    @property
    def has_streams(self) -> bool:
        """Whether its connections mix or write streams, rather than add branches to one state."""
        return any(link.style not in PLAIN for link in self.links)


def layer_numbers(calls: Sequence[Any]) -> list[int]:
    """Block numbers from the first number in the paths of some calls where these ascend, else by order.

    Parameters
    ----------
    calls : sequence of Call
        In order.

    Returns
    -------
    list of int
    """
    numbers = [int(found.group()) if (found := re.search(r"\d+", call.path)) else -1 for call in calls]
    steps = [b - a for a, b in pairwise(numbers)]
    ascending = numbers and numbers[0] >= 0 and all(step in (0, 1) for step in steps)
    return numbers if ascending and (any(steps) or len(calls) < 3) else list(range(len(calls)))
