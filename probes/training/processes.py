"""Which part of a training of several processes is this one? Each measures and writes alone; nothing is exchanged.

The parts are joined when they are read, see `depthscope.diagnostics.schema.joining`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.joining import part_name, parts_of

FULLY_SHARDED = "FullyShardedDataParallel"


def this_part() -> tuple[int, int] | None:
    """The number of this process, and of how many; None where it is alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    number, of = distributed.get_rank(), distributed.get_world_size()
    return (number, of) if of > 1 else None


def place_of_part(store: str | Path, part: tuple[int, int]) -> Path:
    """Where a process writes its part: in a folder of all of them."""
    if str(store).endswith(schema.SUFFIXES):
        raise InputError(
            f"store is {str(store)!r} and {part[1]} processes run, each of which writes a part of the run; expected the name "
            "of a folder, without an ending, that all of them share"
        )
    return Path(store) / part_name(part[0])


def last_common_step(folder: Path) -> int | None:
    """The last step that every part of a run has; None where there are none."""
    histories = [schema.LiveRows(path) for path in parts_of(folder) if schema.is_live_store(path)]
    known = [history.last_step for history in histories if history.last_step is not None]
    return min(known, default=None)


class WeightShares:
    """By which factor the numbers of a parameter, or of its local shard, count: the sum over processes is then the model's."""

    def __init__(self, model: nn.Module, num_processes: int):
        if any(type(module).__name__ == FULLY_SHARDED for module in model.modules()):
            raise InputError(
                "got weights=True with FullyShardedDataParallel, which keeps the weights of many modules in one flat vector; "
                "leave it out, or shard the model by fully_shard, whose weights are measured"
            )
        groups = [
            module.process_group
            for module in model.modules()
            if isinstance(module, nn.parallel.DistributedDataParallel)
        ]
        # Such as of one stage of a pipeline, whose other processes have other weights.
        self._copies = torch.distributed.get_world_size(groups[0]) if groups else num_processes

    def __call__(self, parameter: Any) -> float | None:
        """The factor; None for a partial sum, which no process has."""
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            return 1.0 / self._copies
        share = 1.0
        for axis, placement in enumerate(parameter.placements):
            if placement.is_partial():
                return None
            if placement.is_replicate():
                share /= mesh.size(axis)
        return share * mesh.size() / self._copies if mesh.size() < self._copies else share
