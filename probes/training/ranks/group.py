"""Which processes measure together? Those that train one model on parts of the data, as the model or the user defines it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.errors import CaptureError

WORLD, NONE = "world", "none"
FULLY_SHARDED = "FullyShardedDataParallel"


@dataclass(frozen=True)
class DataGroup:
    """The processes whose tokens are counted together."""

    ranks: tuple[int, ...]  # their numbers in the world, in order; the first of them writes
    rank: int  # position of this process among them
    chosen: str  # how they were chosen, as a phrase

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)


def data_group(model: nn.Module, group: Any = None) -> DataGroup | None:
    """The processes that measure together with this one; None where it measures alone.

    ``model``: as the user trains it, with its wrappers.
    ``group``: ``"world"``, ``"none"``, or the processes that train one model on different data. By default those of the
    model's own wrapper: DistributedDataParallel, `fully_shard`, FullyShardedDataParallel.
    Raises InputError: For a group of another kind, and where several processes run and nothing tells which of them
    belong together.
    """
    if isinstance(group, str) and group not in (WORLD, NONE):
        raise InputError(
            f"group is {group!r}; expected 'world', 'none', a ProcessGroup or a DeviceMesh of one axis"
        )
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not initialised:
        if group is None or isinstance(group, str):
            return None  # one process, which is the world
        raise InputError(
            "got group=, and torch.distributed is not initialised; call init_process_group first"
        )
    if group == NONE or torch.distributed.get_world_size() == 1:
        return None
    if group is not None:
        return _as_data_group(
            _ranks_of(group), "the group that was given" if group != WORLD else "the world, as was given"
        )
    ranks, chosen = _of_wrapper(model)
    return _as_data_group(ranks, chosen)


def _as_data_group(ranks: list[int], chosen: str) -> DataGroup | None:
    this = torch.distributed.get_rank()
    if this not in ranks:
        raise InputError(
            f"the group has the processes {_named(ranks)} and this one is {this}; expected one of its members"
        )
    if len(ranks) == 1:
        return None
    return DataGroup(tuple(ranks), ranks.index(this), f"{chosen}: processes {_named(ranks)}")


def _named(ranks: list[int]) -> str:
    """Numbers of processes as text, without a line of a thousand of them."""
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks if len(ranks) < 9 else [*ranks[:4], "…", ranks[-1]]))


def _ranks_of(group: Any) -> list[int]:
    """The world's numbers of the members of a group, in order."""
    if group == WORLD:
        return list(range(torch.distributed.get_world_size()))
    if hasattr(group, "mesh_dim_names") and hasattr(group, "get_group"):  # a DeviceMesh, whose import is slow
        if group.ndim != 1:
            raise InputError(
                f"group is a DeviceMesh of {group.ndim} axes {group.mesh_dim_names}; expected the one axis over which the "
                'data differ, such as mesh["dp"]'
            )
        return group.mesh.tolist()
    if isinstance(group, torch.distributed.ProcessGroup):
        return torch.distributed.get_process_group_ranks(group)
    raise InputError(
        f"group is of type {type(group).__name__}; expected 'world', 'none', a ProcessGroup or a DeviceMesh of one axis"
    )


def _of_wrapper(model: nn.Module) -> tuple[list[int], str]:
    """The processes of the data-parallel wrapper that the model has, and its name."""
    for wrapper, ranks in _wrappers(model):
        return ranks, wrapper
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise InputError(
            "the parameters of the model are DTensors without fully_shard, as under tensor parallelism: whether the processes "
            "have the same data cannot be known. Pass group= the processes whose data differ, such as mesh['dp'], or "
            "group='none' where all have the same data; under sequence parallelism those whose tokens differ: group='world', "
            "or a mesh of these"
        )
    world = torch.distributed.get_world_size()
    raise InputError(
        f"{world} processes run and the model has no data-parallel wrapper: whether they train one model together cannot be "
        "known. Pass group='world' where each has a part of the data, group= the processes that do, or group='none' where "
        "this process measures alone"
    )


def _wrappers(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Data-parallel wrappers of a model or of its parts, with their processes."""
    for module in model.modules():  # that of a compiled model is inside of it
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield "DistributedDataParallel", _ranks_of(module.process_group)
        state = getattr(module, "_get_fsdp_state", None)
        if state is not None:  # `fully_shard`: the module's class has this method
            mesh = _fsdp_mesh(module)
            yield "fully_shard", sorted(mesh.mesh.flatten().tolist())
        elif type(module).__name__ == FULLY_SHARDED:
            yield FULLY_SHARDED, _ranks_of(module.process_group)


def has_flat_weights(model: nn.Module) -> bool:
    """Whether the weights of many modules are in one flat vector, as FullyShardedDataParallel makes it."""
    return any(type(module).__name__ == FULLY_SHARDED for module in model.modules())


def _fsdp_mesh(module: nn.Module) -> Any:
    """The mesh of `fully_shard`: the axes over which its parameters are sharded and copied, and no others."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one, before torch 2.12
    for group in groups:
        if group is not None:
            return group.mesh_info.mesh
    for parameter in module.parameters():
        if hasattr(parameter, "device_mesh"):
            return parameter.device_mesh
    raise CaptureError("a module of fully_shard has no parameter; pass group=")


def weight_share(group: DataGroup, parameter: nn.Parameter) -> float | None:
    """By which factor the numbers of a parameter are multiplied before they are added over processes.

    ``parameter``: copied to every process, or sharded over them.
    Returns: None where the processes of the group do not have all of it.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 1.0 / group.size
    if not set(mesh.mesh.flatten().tolist()) <= set(group.ranks):
        return None  # as under tensor parallelism: each of the group has the same part
    share = mesh.size() / group.size
    for axis, placement in enumerate(parameter.placements):
        if placement.is_partial():
            return None
        if placement.is_replicate():
            share /= mesh.size(axis)
    return share
