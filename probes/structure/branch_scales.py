"""By what does a plain chain multiply its branches, and its state? Found where the recorded forward adds them up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthscope.probes.reading.description import BranchReading, MemoryReading
from depthscope.probes.reading.graph import PARAMETER, Graph, TracedValue
from depthscope.probes.reading.operations import NORMS, PRODUCTS, addends, only_moves

# Which argument of a norm is the weight that multiplies its result; of all others the second is.
THIRD = frozenset(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", "group_norm"))


@dataclass(frozen=True, eq=False)
class AppliedFunction:
    """One function of one tensor: ``args`` has None in the tensor's place."""

    func: Any
    position: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int = 0  # which of its results

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The result for another tensor."""
        given = (*self.args[: self.position], tensor, *self.args[self.position + 1 :])
        found = self.func(*given, **self.kwargs)
        return found[self.item] if isinstance(found, (tuple, list)) else found


@dataclass(frozen=True)
class BranchScale:
    """A parameter that multiplies a branch, after some functions."""

    name: str  # in the model
    functions: tuple[AppliedFunction, ...] = ()  # first to last

    def value(self, model: nn.Module) -> torch.Tensor | None:
        """What multiplies the branch at present; None where the parameter is gone or elsewhere."""
        try:
            scale: torch.Tensor = model.get_parameter(self.name).detach()
        except AttributeError:
            return None
        # Subclasses, as of sharded weights, have a part of their numbers here.
        if type(scale) is not torch.Tensor or scale.is_meta:
            return None
        for function in self.functions:
            scale = function(scale)
        return scale.float()


Term = tuple[BranchScale, ...]  # what multiplies one thing that is added to the state


def branch_scales(graph: Graph, branches: Iterable[BranchReading]) -> tuple[Term, ...]:
    """The scales of each branch that a plain chain adds."""
    known: dict[int, list[Term]] = {}
    return tuple(term for branch in branches for term in _terms(graph, graph.values[branch.way[-1]], known))


def _terms(graph: Graph, value: TracedValue, known: dict[int, list[Term]]) -> list[Term]:
    """What multiplies each of the things that are added up in a value; walked back to what no linear step made."""
    if value.number not in known:
        own: Term = ()
        behind: list[TracedValue] = []
        if value.name in NORMS:
            weight = value.args[2 if value.name in THIRD else 1 : 3 if value.name in THIRD else 2]
            own = _scales(graph, weight)
        elif value.name in PRODUCTS:
            own = _scales(graph, value.args[:2])
            behind = [v for v in value.args[:2] if isinstance(v, TracedValue) and v.numel == value.numel][:1]
        elif value.name in ("add", "sub"):
            behind = [v for v in addends(value) if graph.depends_on_input(v)]
        elif only_moves(value):
            behind = list(value.parents[:1])
        inner = [term for v in behind for term in _terms(graph, v, known)] if behind else [()]
        known[value.number] = list(dict.fromkeys((*own, *term) for term in inner))
    return known[value.number]


def _scales(graph: Graph, factors: Iterable[Any]) -> Term:
    """Those of some factors that are a parameter, or were made of one."""
    found = (_origin(graph, factor) for factor in factors if isinstance(factor, TracedValue))
    return tuple(scale for scale in found if scale is not None)


def _origin(graph: Graph, value: TracedValue) -> BranchScale | None:
    """The parameter that a vector is, or was made of; None where it was made of something else."""
    functions: list[AppliedFunction] = []
    while value.kind != PARAMETER:
        if value.func is None or not isinstance(value.func, torch._ops.OpOverload) or len(value.parents) != 1:
            return None
        at = next((n for n, argument in enumerate(value.args) if isinstance(argument, TracedValue)), None)
        if at is None or value.numel != max(value.shape, default=1):
            return None
        rest = (*value.args[:at], None, *value.args[at + 1 :])
        functions.insert(0, AppliedFunction(value.func, at, rest, dict(value.kwargs), value.item))
        value = value.parents[0]
    name = graph.parameter_names.get(value.number, "")
    return (
        BranchScale(name, tuple(functions)) if name and value.numel == max(value.shape, default=1) else None
    )


def gates_the_state(memory: MemoryReading) -> bool:
    """Whether a state is scaled otherwise at each token, and not only dropped at some, as by a mask."""
    known: set[tuple[Any, ...]] = set()
    for parts in (connection.parts for connection in memory.connections):
        scale = parts["residual_gate"] if "residual_gate" in parts else parts["h_res"]
        place = scale.data_ptr(), scale.shape, scale.stride()  # equal blocks have one tensor
        if place in known:
            continue
        known.add(place)
        scale = scale.reshape(len(scale), -1)
        largest = scale.amax(0)
        smallest = torch.where(scale == 0, largest, scale).amin(0)
        if bool(((largest - smallest).abs() > 1e-5 * largest.abs()).any()):
            return True
    return False
