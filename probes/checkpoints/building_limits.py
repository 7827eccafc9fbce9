"""Is a model as large as its weights? Refused while transformers builds it without data, before any memory is taken."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from depthscope.probes.checkpoints.errors import CheckpointError

# What a model may have beyond what is stored. All heuristics of ours, far above every model of the compatibility page.
MOST_COPIES = 4  # of a stored element: tied weights are built once for each name and then joined
SPARE_PARAMETERS = 1 << 20
SPARE_BUFFERS = 1 << 27  # elements: causal masks and position tables are not stored
SPARE_MODULES = 50_000
MODULES_PER_TENSOR = 50
# A number above this one is a size of no model, unless a stored tensor has a dimension as large. Lists of so many entries
# are made in a fraction of a second.
LARGEST_COUNT = 10**6
LONGEST_LIST = 100_000  # each entry is validated, and copied with the configuration, some ten times
# Numbers that count nothing that is built, and may be larger: positions, frequencies, tokens' numbers.
NO_COUNT = re.compile(
    r"position|length|window|context|tokenizer_chunk|theta|base|freq|seed|_ids?$|param|total"
)
LARGEST_NUMBER = 1 << 40
DEEPEST_CONFIG = 50


@dataclass(frozen=True)
class StoredSize:
    """How much the weight files of a checkpoint contain."""

    num_elements: int
    num_tensors: int
    largest_dimension: int


def check_numbers(config: Mapping[str, Any], stored: StoredSize, source: str) -> None:
    """Refuse a configuration with a number that no model of this size has.

    Lists, dictionaries and modules are made from such numbers when a configuration is read, whatever they are called.
    """
    limit = max(LARGEST_COUNT, stored.largest_dimension)
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if depth > DEEPEST_CONFIG:
            raise CheckpointError(f"{source} is nested too deeply; expected a transformers configuration")
        if isinstance(value, Mapping):
            waiting.extend((str(key), each, depth + 1) for key, each in value.items())
        elif isinstance(value, (list, tuple)):
            if len(value) > LONGEST_LIST:
                raise CheckpointError(
                    f"{source}: '{name}' has {len(value)} entries; expected at most {LONGEST_LIST}"
                )
            waiting.extend((name, each, depth + 1) for each in value)
        elif isinstance(value, (int, float)) and _is_too_large(name, value, limit):
            raise CheckpointError(
                f"{source}: '{name}' is {value:.4g}, but the largest dimension of the stored tensors is "
                f"{stored.largest_dimension}; the configuration is another model's or damaged: download it again"
                if abs(value) < 1e300
                else f"{source}: '{name}' is larger than any number of a model; download it again"
            )


def _is_too_large(name: str, value: float, limit: int) -> bool:
    if isinstance(value, float):  # a real number counts nothing, unless code rounds it
        return (
            math.isfinite(value)
            and value.is_integer()
            and not NO_COUNT.search(name)
            and value > LARGEST_NUMBER
        )
    return abs(value) > (LARGEST_NUMBER if NO_COUNT.search(name) else limit)


@contextmanager
def building_limits(stored: StoredSize, source: str) -> Iterator[None]:
    """Refuse a model that becomes larger than its weights, while it is built.

    transformers builds on the meta device first, where a parameter of any size takes no memory and is registered with its
    module: there it is counted. Only models that this thread builds are.
    """
    budget = _Budget(stored, source)
    handles = [
        hooks.register_module_module_registration_hook(budget.count_module),
        hooks.register_module_parameter_registration_hook(budget.count_parameter),
        hooks.register_module_buffer_registration_hook(budget.count_buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Budget:
    def __init__(self, stored: StoredSize, source: str):
        self.source, self.stored, self.thread = source, stored, threading.get_ident()
        built = MOST_COPIES * stored.num_elements
        self.limits = {
            "modules": MODULES_PER_TENSOR * stored.num_tensors + SPARE_MODULES,
            "parameters": built + SPARE_PARAMETERS,
            "buffers": built + SPARE_BUFFERS,
        }
        # By the device as well: what is built without data is filled afterwards, and registered once more.
        self.counts: dict[tuple[str, bool], int] = {}

    # The hooks return nothing, so that what is registered stays as it is.

    def count_module(self, _owner: nn.Module, _name: str, _module: nn.Module | None) -> None:
        self._add("modules", 1, False)

    def count_parameter(self, _owner: nn.Module, _name: str, value: torch.Tensor | None) -> None:
        self._add_tensor("parameters", value)

    def count_buffer(self, _owner: nn.Module, _name: str, value: torch.Tensor | None) -> None:
        self._add_tensor("buffers", value)

    def _add_tensor(self, kind: str, value: torch.Tensor | None) -> None:
        # a lazy parameter has no size yet
        if value is not None and not nn.parameter.is_lazy(value):
            self._add(kind, value.numel(), value.is_meta)

    def _add(self, kind: str, number: int, is_meta: bool) -> None:
        if threading.get_ident() != self.thread:
            return
        count = self.counts[kind, is_meta] = self.counts.get((kind, is_meta), 0) + number
        if count > self.limits[kind]:
            what = kind if kind == "modules" else f"elements in {kind}"
            raise CheckpointError(
                f"'{self.source}': its configuration gives a model of more than {self.limits[kind]} {what}, but its weight "
                f"files contain {self.stored.num_elements} elements; the configuration is another model's or damaged: "
                "download it again"
            )
