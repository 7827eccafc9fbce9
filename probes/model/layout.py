"""Which axis of a residual state is batch, token, stream and feature? A short text, the layout, names them.

A layout is a text such as ``"B T D"``, ``"B T N D"``, ``"(B N) T D"`` or ``"B D H W"``: B batch, T tokens,
N streams, F fractions of a stream's features (each counts as a stream of its own), D features, H and W the two axes of an
image (their product is T). Brackets enclose merged axes, outer first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import torch

from depthscope.diagnostics.errors import InputError

AXES = frozenset("BTNFDHW")


class LayoutError(InputError):
    """A layout that cannot be read, or that does not fit the state."""


def parse_layout(layout: str) -> list[list[str]]:
    """Parse a layout into one list of axis letters per tensor dimension.

    Examples
    --------
    >>> parse_layout("(B N) T D")
    [['B', 'N'], ['T'], ['D']]
    """
    if not layout:
        raise LayoutError(
            "an empty layout cannot be read: the states have their sequences, tokens and features in no order that a layout "
            "can name; say how they are read with layout=, such as 'B T D'"
        )
    # Each match is a pair (letters inside brackets, a letter outside); one of the two is empty.
    matches = re.findall(r"\(([^)]*)\)|(\S)", layout)
    groups = [list((merged or single).replace(" ", "")) for merged, single in matches if merged or single]
    letters = [letter for group in groups for letter in group]
    if set(letters) - AXES or len(set(letters)) != len(letters) or "D" not in letters:
        raise LayoutError(
            f"layout {layout!r} cannot be read; expected the letters B T N D (or H W), D at least, merged axes in "
            "brackets, such as 'B T D', 'B T N D', '(B N) T D', 'N B T D' or 'B D H W'"
        )
    return groups


def is_packed(layout: str) -> bool:
    """Whether a layout names no axis of sequences: all tokens are said to be of one."""
    return not any("B" in group for group in parse_layout(layout))


def canonical(
    state: torch.Tensor, layout: str, *, batch_size: int, num_streams: int, fractions: int = 1
) -> torch.Tensor:
    """Reorder a state to (batch, token, stream, feature), as a view where possible.

    ``batch_size, num_streams``: sizes by which merged axes are split; ``num_streams`` counts the fractions, so it is N
    · F.
    ``fractions``: number of fractions F of each stream.
    Returns: Shape (B, T, N, D), N streams times fractions; axes that the layout does not name have size 1.
    """
    split, order, merged = _arrangement(layout, tuple(state.shape), batch_size, num_streams, fractions)
    return state.reshape(split).permute(order).reshape(merged)


@lru_cache(maxsize=1024)
def _arrangement(
    layout: str, shape: tuple[int, ...], batch_size: int, num_streams: int, fractions: int
) -> tuple[list[int], list[int], tuple[int, int, int, int]]:
    """Of a state of a shape: the sizes of all axes, their order as (B, T, N, D), and the sizes of these."""
    groups = parse_layout(layout)
    if len(groups) != len(shape):
        raise LayoutError(
            f"layout {layout!r} has {len(groups)} axes, the state has {len(shape)}, of shape {shape}; name each of them"
        )
    known = {"B": batch_size, "N": num_streams // fractions, "F": fractions}
    sizes: dict[str, int] = {}
    for group, size in zip(groups, shape, strict=True):
        sizes |= _split(group, size, known, layout, shape)
    letters = [letter for group in groups for letter in group]
    # Streams before fractions: stream n, fraction f gets the index n · F + f of the result.
    order = [letters.index(letter) for letter in "BTHWNFD" if letter in letters]
    tokens = math.prod(sizes.get(letter, 1) for letter in "HWT")
    streams = sizes.get("N", 1) * sizes.get("F", 1)
    return [sizes[letter] for letter in letters], order, (sizes.get("B", 1), tokens, streams, sizes["D"])


def count_streams(shape: Sequence[int], layout: str, batch_size: int, asserted: int | None = None) -> int:
    """Number of streams in a state of a given layout; of streams that are merged into features or tokens the asserted one.

    Raises LayoutError: Where the state has another number of them than is asserted.
    """
    counted, groups = 1, parse_layout(layout)
    for group, size in zip(groups, shape, strict=False):
        if "N" in group and sorted(group) not in (["N"], ["B", "N"]):
            return asserted or 1
        if "N" in group:
            counted = size // (batch_size if "B" in group else 1)
    # Of a layout with more or fewer axes than the state, `canonical` says so.
    if asserted not in (None, counted) and len(groups) == len(shape):
        raise LayoutError(
            f"got streams={asserted}, but a state of shape {tuple(shape)} has {counted} in the layout {layout!r}; leave "
            "streams= out, or name with layout= the axis that they are merged into, as 'B T (N D)' does"
        )
    return counted


def _split(
    group: Sequence[str], size: int, known: dict[str, int], layout: str, shape: tuple[int, ...]
) -> dict[str, int]:
    """Sizes of the axes that are merged in one tensor dimension; at most one of them may be unknown."""
    # An axis that is not merged needs no splitting: its size is the tensor's, whatever the batch size is.
    free = [letter for letter in group if len(group) == 1 or letter not in known]
    fixed = {letter: known[letter] for letter in group if letter not in free}
    rest, remainder = divmod(size, math.prod(fixed.values()))
    if remainder or len(free) > 1 or (not free and rest != 1):
        raise LayoutError(
            f"layout {layout!r} does not fit a state of shape {shape} with batch {known['B']} and "
            f"{known['N']} streams; pass layout= and, for streams, a model whose connections are found"
        )
    if free:
        fixed[free[0]] = rest
    return fixed
