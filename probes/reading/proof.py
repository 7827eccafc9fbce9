"""Is what was read true, and is it everything? States and reads from the reported parts alone; where every weight works."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.connections import BranchParts, ConnectionParts, DepthParts
from depthscope.probes.reading.cuts import Cut
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import MATRICES, addends, weights_of
from depthscope.probes.reading.states import States

# Of sums in another order, in units of the least difference that the model's numbers have.
ROUNDING = {torch.float64: 512.0, torch.float32: 512.0, torch.bfloat16: 4.0, torch.float16: 16.0}


def tolerance(values: Iterable[TracedValue]) -> float:
    """How far recomputed values may be off, relative to their largest number."""
    return max(ROUNDING.get(v.dtype, 4.0) * torch.finfo(v.dtype).eps for v in values if v.is_floating)


def _error(again: torch.Tensor, true: torch.Tensor) -> float:
    error = (again - true).abs().max() / true.abs().max().clamp_min(1e-9)
    return float(error.nan_to_num(float("inf"), float("inf")))


def _applied(matrix: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """(tokens, to, from, features or 1) applied to (tokens, from, features)."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0].to(state) @ state
    return (matrix.to(state) * state[:, None]).sum(2)


def recomputed(states: States, before: Cut, parts: ConnectionParts) -> float:
    """How far the next state, and every read, is from what the reported parts give."""
    state = states.array(before)
    total = _applied(parts.h_res, state)
    for branch in parts.branches:
        total = total + _added(branch)
    if parts.constant is not None:
        total = total + parts.constant
    errors = [_error(total, states.array(parts.target))]
    for branch in parts.branches:
        for read, weight in branch.reads:
            if _is_pure(states, before, read):
                errors.append(_error(_applied(weight, state), states.array([read])))
    return max(errors)


def _added(branch: BranchParts) -> torch.Tensor:
    """What a branch adds, from its output and its weights; from its replay where its output has no order of its own."""
    if branch.out is None:
        return branch.added
    return _applied(branch.write, branch.out)


def _is_pure(states: States, before: Cut, read: TracedValue) -> bool:
    """Whether a read is made of a state alone: no other branch and no constant comes to it in between."""
    memory, cut = states.memory, {value.number for value in before}
    seen: set[int] = set()
    waiting = [read]
    while waiting:
        value = waiting.pop()
        if value.number in cut or value.number in seen:
            continue
        seen.add(value.number)
        inside = memory.inside(value)
        if not inside or value.number in memory.writes or len(addends(value)) > len(inside):
            return False
        waiting += inside
    return True


def recomputed_depth(states: States, parts: DepthParts) -> float:
    """How far states and reads are from the weighted sums of what is reported; infinite where a source has no order."""
    worst = 0.0
    for number, row in parts.weights.items():
        total = parts.constants[number]
        for source, weight in zip(parts.sources, row, strict=True):
            if source is None:
                if bool(weight.any()):
                    return float("inf")
                continue
            total = total + weight.to(source) * source
        worst = max(worst, _error(total, states.array([states.graph.values[number]])[:, 0]))
    return worst


class WeightCoverage:
    """Where the parameters work that reach the output: before the first state, in a branch, in the head, or elsewhere."""

    def __init__(
        self,
        memory: Memory,
        branches: Sequence[Branch],
        last: Sequence[TracedValue],
        others: Sequence[Memory],
    ):
        self._others = set().union(*(other.carried for other in others))
        self.memory, self.graph, self.branches = memory, memory.graph, branches
        self.last = {value.number for value in last}
        reach = self._behind(self.graph.outputs or [memory.end], set())
        used = {w for n in reach for w in weights_of(self.graph.values[n])}
        inside = self._between()
        before = self._behind([memory.root], set())
        head = self._behind(self.graph.outputs or [memory.end], self.last | set(memory.carried))
        self.by_place = {
            "branches": self._weights(inside) & used,
            "before": self._weights(before) & used,
            "head": self._weights(head) & used,
        }
        self.elsewhere = used - set().union(*self.by_place.values())
        self._used = used

    def _weights(self, numbers: Iterable[int]) -> set[TracedValue]:
        return {w for n in numbers for w in weights_of(self.graph.values[n])}

    @staticmethod
    def _behind(ends: Sequence[TracedValue], stop: set[int]) -> set[int]:
        found: set[int] = set()
        waiting = [end for end in ends if end.number not in stop]
        while waiting:
            value = waiting.pop()
            if value.number in found:
                continue
            found.add(value.number)
            waiting += [parent for parent in value.parents if parent.number not in stop]
        return found

    def _between(self) -> set[int]:
        """Operations of branches, and of the coefficients with which the memory is mixed, read and written."""
        memory, values = self.memory, self.graph.values
        reads = [branch.read for branch in self.branches]
        carried = memory.back([memory.end, *reads])
        ends = [
            p
            for number in carried - {memory.root.number}
            for p in values[number].parents
            if not memory.holds(p)
        ]
        ends += [values[number] for number in memory.born & carried]
        stop = carried - memory.born
        ends += [branch.source for branch in self.branches]
        found = self._behind(ends, stop) | carried - {memory.root.number}
        return found - self._behind([memory.root], set())

    def shares(self) -> dict[str, float]:
        """The shares of the parameters that reach the output."""
        total = sum(w.numel for w in self._used)
        sizes = {name: sum(w.numel for w in of) for name, of in self.by_place.items()}
        sizes["elsewhere"] = sum(w.numel for w in self.elsewhere)
        return {name: size / max(total, 1) for name, size in sizes.items()}

    def why_incomplete(self) -> str:
        """What the states leave out; empty where they are complete."""
        if self.elsewhere:
            names = sorted(self.graph.parameter_names.get(w.number, "") for w in self.elsewhere)
            share = self.shares()["elsewhere"]
            return f"{share:.0%} of the weights lie in no branch (first: {names[0]})"
        if (value := self._residual_sum(self._behind([self.memory.root], set()))) is not None:
            return f"before the first state a branch is added already, in {self.graph.path(value) or 'the model'}"
        return self._hidden_branches()

    def _residual_sum(self, numbers: set[int]) -> TracedValue | None:
        """A sum of a value and of something that a weight computed from it."""
        for number in sorted(numbers):
            value = self.graph.values[number]
            added = addends(value) if value.name in ("add", "sub") else []
            if (
                number not in self._others
                and len(added) == 2
                and any(self._is_branch(a, b) for a, b in (added, added[::-1]))
            ):
                return value
        return None

    def _is_branch(self, a: TracedValue, b: TracedValue) -> bool:
        if a.shape != b.shape or len(a.shape) < 2 or a.kind or not self.graph.depends(b, a):
            return False
        behind = self._behind([b], {a.number})
        return any(
            self.graph.values[n].name in MATRICES | {"convolution": 0} and weights_of(self.graph.values[n])
            for n in behind
        )

    def _hidden_branches(self) -> str:
        """Sums of several branch outputs are one branch only where they are added at once."""
        for branch in self.branches:
            if branch.source.number not in self.memory.born or branch.source.name != "add":
                continue
            parts = [v for v in addends(branch.source) if self.graph.depends(v, self.memory.root)]
            if len(parts) > 1 and self.graph.depends(parts[1], parts[0]) | self.graph.depends(
                parts[0], parts[1]
            ):
                return f"a sum of several branches in {self.graph.path(branch.source) or 'the model'} is read as one"
        return ""
