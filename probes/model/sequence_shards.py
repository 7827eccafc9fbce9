"""Does each process have only a part of every sequence? Then its states look like whole sequences, and are not.

Under sequence parallelism the tokens of a sequence are spread over processes between the blocks, as plain tensors of fewer
tokens; under context parallelism everywhere. Shapes do not show it. What shows it are the hooks that torch's and transformers'
parallel styles put on modules, which contain how inputs and outputs are placed, and the attention that context parallelism
puts in the place of torch's.

Where these hooks name one axis of processes and nothing but equal parts of the tokens along it, a process's part of a sequence
is known, and several processes can measure all of it together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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
    "sequence parallelism, such as its saved checkpoint in one process; a training can be recorded by all processes that "
    "share sequences, with group='world' or a group of them"
)
CONTEXT = "context parallelism"
OF_CONTEXT = (
    "each process has two parts of every sequence that do not follow each other, and nothing in the model says which; call a "
    "replica of the model without it, such as its saved checkpoint in one process"
)


@dataclass(frozen=True)
class TokenShards:
    """How the tokens of every sequence are spread over processes: in equal parts, in the order of the processes.

    ``ranks``: numbers of the processes in the world, in the order of their tokens.
    ``position``: of this process among them.
    """

    ranks: tuple[int, ...]
    position: int

    def part(self, tokens: int) -> slice:
        """Which tokens of a sequence this process has: as torch's chunks, whose last ones are shorter or empty.

        Examples
        --------
        >>> [TokenShards((0, 1, 2), position).part(7) for position in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
        """
        size = -(-tokens // len(self.ranks))
        start = min(self.position * size, tokens)
        return slice(start, min(start + size, tokens))

    def local(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tokens of a state, or of its gradient, that this process has; a plain tensor has no others.

        ``tensor``: A DTensor is sharded over its tokens, or whole in every process.
        Raises CaptureError: For a DTensor that is placed otherwise, or over other processes.
        """
        placements = getattr(tensor, "placements", None)
        if placements is None:
            return tensor
        mesh: Any = tensor.device_mesh
        placed = (
            f"a state, or its gradient, is placed as {', '.join(map(str, placements))} over the processes "
        )
        placed += f"{mesh.mesh.tolist()}"
        if mesh.ndim != 1 or tuple(mesh.mesh.tolist()) != self.ranks:
            raise CaptureError(f"{placed}; expected one axis of processes, {list(self.ranks)}")
        (placement,) = placements
        if type(placement).__name__ == "Shard" and placement.dim % tensor.ndim == axis:
            return tensor.to_local()
        if placement.is_replicate():
            whole = tensor.to_local()
            return whole[(slice(None),) * axis + (self.part(whole.shape[axis]),)]
        raise CaptureError(
            f"{placed}; expected all of it in each process, or a part of its tokens (axis {axis})"
        )


def token_shards(model: nn.Module) -> TokenShards | None:
    """How the hooks of parallel styles spread the tokens of a model's sequences over processes; None where they do not.

    Raises CaptureError: Under context parallelism, and where the hooks name several axes of processes or none.
    """
    meshes = set()
    for path, module in module_paths(model):
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            values = list(_referred_to(hook, 0, set()))
            if any(map(_is_of_context_parallelism, values)):
                raise CaptureError(f"context parallelism at {path or 'the model'}: {OF_CONTEXT}")
            if not any(map(_is_token_shard, values)):
                continue
            named = {
                tuple(mesh.mesh.tolist())
                for mesh in values
                if hasattr(mesh, "mesh_dim_names") and hasattr(mesh, "get_group") and mesh.ndim == 1
            }
            meshes |= named
            if not named or len(meshes) > 1:
                raise CaptureError(
                    f"sequence parallelism at {path or 'the model'} over the processes {sorted(meshes) or 'of no mesh'}; "
                    f"expected one axis of processes for all modules. Else {ADVICE}"
                )
    if not meshes:
        return None
    (ranks,) = meshes
    return TokenShards(ranks, ranks.index(torch.distributed.get_rank())) if len(ranks) > 1 else None


def require_whole_sequences(model: nn.Module, *, hooks: bool, known: TokenShards | None = None) -> None:
    """Require that the model's states have all tokens of their sequences, or the parts of them that are known.

    ``hooks``: whether the hooks of its modules are looked at too, which takes some microseconds a module.
    ``known``: how the tokens are spread over processes that measure together.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    if _is_of_context_parallelism(nn.functional.scaled_dot_product_attention):
        raise CaptureError(f"the model runs under context parallelism: {OF_CONTEXT}")
    if known is not None:
        if hooks and token_shards(model) != known:
            raise CaptureError(
                f"the tokens are spread over processes otherwise than when the recorder was made; {ADVICE}"
            )
        return
    for path, module in module_paths(model) if hooks else ():
        found = _shards_tokens(module)
        if found:
            why = f"each process has some tokens of every sequence there; {ADVICE}"
            why = OF_CONTEXT if found == CONTEXT else why
            raise CaptureError(f"{found} at {path or 'the model'}: {why}")


def _shards_tokens(module: nn.Module) -> str:
    """How the hooks of a module spread the tokens over processes; empty where they do not."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for value in _referred_to(hook, 0, set()):
            if _is_of_context_parallelism(value):
                return CONTEXT
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
