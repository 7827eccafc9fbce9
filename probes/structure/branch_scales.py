"""By which parameters does a plain chain multiply its branches? Found where the recorded forward adds them to the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from depthscope.probes.dataflow.operations import NORMS
from depthscope.probes.dataflow.parameters import AppliedFunction, ConstantOrigin
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value, carrier_of
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.plain_proof import plain_path, states_of
from depthscope.probes.structure.tape import Tape

# Which argument of a norm is the weight that multiplies its result; of all others the second is.
THIRD = frozenset(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", "group_norm"))


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


Term = tuple[ConstantOrigin, ...]  # what multiplies one thing that is added to the state


def branch_scales(tape: Tape, chain: Chain, model: nn.Module) -> tuple[tuple[BranchScale, ...], ...]:
    """The scales of each branch that a chain adds; empty where not every step is known to be a sum with the state."""
    if tape.trace is None or tape.trace.error is not None or chain.has_streams or chain.history:
        return ()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[tuple[BranchScale, ...]] = []
    for before, after in pairwise(states_of(tape, chain.points)):
        if before is None or after is None:
            return ()
        if before is after or before.shape != after.shape:  # no block between them; a new stage
            continue
        terms = _added(tape.trace, before, after)
        if not terms:
            return ()
        # Sharded and replaced parameters are others than the model has after its forward.
        found += [
            tuple(BranchScale(names[id(o.parameter)], o.functions) for o in term if id(o.parameter) in names)
            for term in terms
        ]
    return tuple(found)


def _added(trace: Trace, before: Value, after: Value) -> list[Term]:
    """What multiplies each branch that is added between two states."""
    path = plain_path(before, after)
    terms: list[Term] = []
    for linear in () if path is None else path[0]:
        carrying = linear.carrying
        numbers = {value.number for value in carrying}
        for value in carrying:
            step = value.step
            if value is before or step is None or not step.rule.sums:
                continue
            for operand in step.operands:
                if operand.number not in numbers and trace.depends(operand, before):
                    terms += _terms(trace, operand)
    return terms


def _terms(trace: Trace, added: Value) -> list[Term]:
    """What multiplies each of the things that are added up in a value; walked back to what no linear step made."""
    known: dict[int, list[Term]] = {}
    waiting = [added]
    while waiting:
        value = waiting[-1]
        behind = [v for v in _behind(value) if v.number not in known]
        if behind:
            waiting += behind
            continue
        own = _own_scale(trace, value)
        before = _behind(value)
        inner = [term for v in before for term in known[v.number]] if before else [()]
        known[value.number] = list(dict.fromkeys((*own, *term) for term in inner))
        waiting.pop()
    return known[added.number]


def _behind(value: Value) -> Sequence[Value]:
    """The values that are added up, or the one that is multiplied, in a value."""
    step = value.step
    if step is None or step.rule.function:
        return ()
    return (carrier_of(step),) if step.rule.product else step.operands


def _own_scale(trace: Trace, value: Value) -> Term:
    """The parameters by which the step that made a value multiplies."""
    step = value.step
    if step is None:
        return ()
    if step.name in NORMS:
        weight = 2 if step.name in THIRD else 1
        factors = step.args[weight : weight + 1]
    else:
        factors = step.args[:2] if step.name == "mul" else ()
    return tuple(found for factor in factors if (found := trace.constants.origin(factor)) is not None)
