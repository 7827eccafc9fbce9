"""Does each process have only a part of every sequence? Then its states look like whole sequences, and are not.

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

ADVICE = (
    "a part of a sequence has other norms, ranks and similarities than the whole. Capture one replica of the model without "
    "sequence parallelism, such as its saved checkpoint in one process"
)


def require_whole_sequences(model: nn.Module, *, hooks: bool) -> None:
    """Require that the model's states have all tokens of their sequences.

    Parameters
    ----------
    model : Module
        About to run.
    hooks : bool
        Whether the hooks of its modules are looked at too, which takes some microseconds a module.

    Raises
    ------
    CaptureError
        Under sequence or context parallelism over several processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    if _is_of_context_parallelism(nn.functional.scaled_dot_product_attention):
        raise CaptureError(
            f"the model runs under context parallelism, each process with some tokens of every sequence; {ADVICE}"
        )
    for path, module in module_paths(model) if hooks else ():
        found = _shards_tokens(module)
        if found:
            raise CaptureError(
                f"{found} at {path or 'the model'}: each process has some tokens of every sequence there; {ADVICE}"
            )


def _shards_tokens(module: nn.Module) -> str:
    """How the hooks of a module spread the tokens over processes; empty where they do not."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for value in _referred_to(hook, 0, set()):
            if _is_of_context_parallelism(value):
                return "context parallelism"
            if _is_token_shard(value):
                return f"sequence parallelism ({value})"
    return ""


def _is_token_shard(value: Any) -> bool:
    # By attribute: importing DTensor takes a second, and some builds of torch lack it.
    is_shard = getattr(type(value), "is_shard", None)
    return is_shard is not None and bool(value.is_shard()) and getattr(value, "dim", -1) in TOKEN_AXES


def _is_of_context_parallelism(value: Any) -> bool:
    of = value if isinstance(value, FunctionType) else type(value)
    return "_context_parallel" in (getattr(of, "__module__", None) or "")


def _referred_to(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """What a hook refers to: by its closure, its bound arguments, or the object whose method it is."""
    if (
        depth > MAX_DEPTH
        or id(value) in seen
        or isinstance(value, (nn.Module, torch.Tensor, str, int, float, type(None)))
    ):
        return
    seen.add(id(value))
    yield value
    for each in _parts(value):
        yield from _referred_to(each, depth + 1, seen)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        return _cell_contents(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return list(vars(value).values()) if _is_style(value) else []


def _cell_contents(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is not filled yet
            found.append(cell.cell_contents)
    return found


def _is_style(value: Any) -> bool:
    """Whether an object is a parallel style, as torch, transformers and their users write them."""
    return any(base.__name__ in ("ParallelStyle", "TensorParallelLayer") for base in type(value).__mro__)
