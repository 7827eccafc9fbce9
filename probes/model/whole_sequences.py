"""Does each process have only a part of every sequence? Then its states look like whole sequences, and are not: refused.

Under sequence parallelism the tokens of a sequence are spread over processes between the blocks, as plain tensors of fewer
tokens; under context parallelism everywhere. Shapes do not show it. What shows it are the hooks that torch's and transformers'
parallel styles put on modules, which contain how inputs and outputs are placed, and the attention that context parallelism
puts in the place of torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.modules import module_paths

MAX_DEPTH = (
    6  # of what a hook refers to: a lambda, its function, a partial, its style, the style's placements
)
TOKEN_AXES = (0, 1)  # of states (B, T, D), (T, B, D) and (tokens, D); features are the last axis
REFUSED = (
    "{}: each process has a part of every sequence, whose norms, ranks and similarities are not those of the whole; measure a "
    "replica of the model without it, such as its saved checkpoint in one process"
)


def require_whole_sequences(model: nn.Module, *, hooks: bool) -> None:
    """Require that the model's states have all tokens of their sequences.

    ``hooks``: whether the hooks of its modules are looked at too, which takes some microseconds a module.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    if _is_of_context_parallelism(nn.functional.scaled_dot_product_attention):
        raise CaptureError(REFUSED.format("the model runs under context parallelism"))
    for path, module in module_paths(model) if hooks else ():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            for value in _referred_to(hook, 0, set()):
                kind = "context" * _is_of_context_parallelism(value) or "sequence" * _is_token_shard(value)
                if kind:
                    raise CaptureError(REFUSED.format(f"{kind} parallelism at {path or 'the model'}"))


def _is_token_shard(value: Any) -> bool:
    # By attribute: importing DTensor takes a second, and some builds of torch lack it.
    is_shard = getattr(type(value), "is_shard", None)
    return is_shard is not None and bool(value.is_shard()) and getattr(value, "dim", -1) in TOKEN_AXES


def _is_of_context_parallelism(value: Any) -> bool:
    of = value if isinstance(value, FunctionType) else type(value)
    return "_context_parallel" in (getattr(of, "__module__", None) or "")


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
        found = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a cell that is not filled yet
                found.append(cell.cell_contents)
        return found
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (tuple, list, dict)):
        return list(value.values() if isinstance(value, dict) else value)
    # A parallel style, as torch, transformers and their users write them.
    is_style = any(base.__name__ in ("ParallelStyle", "TensorParallelLayer") for base in type(value).__mro__)
    return list(vars(value).values()) if is_style else []
