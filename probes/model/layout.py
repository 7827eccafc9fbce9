"""Which axis of a residual state is batch, token, stream and feature? A short text, the layout, names them.

A layout is a text such as ``"B T D"``, ``"B T N D"``, ``"(B N) T D"`` or ``"B D H W"``: B batch, T tokens,
N streams, F fractions of a stream's features (each counts as a stream of its own), D features, H and W the two axes of an
image (their product is T). Brackets enclose merged axes, outer first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.modules import module_paths

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
    """Number of streams in a state of a given layout; of streams that are merged into features or tokens the asserted one."""
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


# Of what a hook refers to: a lambda, its function, a partial, its style, the style's placements.
MAX_DEPTH = 6
TOKEN_AXES = (0, 1)  # of states (B, T, D), (T, B, D) and (tokens, D); features are the last axis
REFUSED = (
    "{}: each process has a part of every sequence, whose norms, ranks and similarities are not those of the whole; measure a "
    "replica of the model without it, such as its saved checkpoint in one process"
)


def require_whole_sequences(model: nn.Module) -> None:
    """Require that the model's states have all tokens of their sequences."""
    if not are_several():
        return
    if kind := _parallelism(nn.functional.scaled_dot_product_attention):
        raise CaptureError(REFUSED.format(f"the model runs under {kind} parallelism"))
    for path, module in module_paths(model):
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if kind := next(filter(None, map(_parallelism, _referred_to(hook, 0, set()))), ""):
                raise CaptureError(REFUSED.format(f"{kind} parallelism at {path or 'the model'}"))


def are_several() -> bool:
    """Whether this process is one of several that exchange tensors."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _parallelism(value: Any) -> str:
    """The kind of parallelism over tokens that a value belongs to; empty for any other."""
    of = value if isinstance(value, FunctionType) else type(value)
    if "_context_parallel" in (getattr(of, "__module__", None) or ""):
        return "context"
    # By attribute: importing DTensor takes a second, and some builds of torch lack it.
    is_shard = hasattr(type(value), "is_shard") and bool(value.is_shard())
    return "sequence" if is_shard and getattr(value, "dim", -1) in TOKEN_AXES else ""


def _referred_to(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """What a hook refers to: by its closure, its bound arguments, or the object whose method it is."""
    plain = (nn.Module, torch.Tensor, str, int, float, type(None))
    if depth > MAX_DEPTH or id(value) in seen or isinstance(value, plain):
        return
    seen.add(id(value))
    yield value
    for each in _parts(value):
        yield from _referred_to(each, depth + 1, seen)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        # Without cells that are not filled yet.
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (tuple, list, dict)):
        return list(value.values() if isinstance(value, dict) else value)
    # A parallel style, as torch, transformers and their users write them.
    is_style = any(base.__name__ in ("ParallelStyle", "TensorParallelLayer") for base in type(value).__mro__)
    return list(vars(value).values()) if is_style else []
