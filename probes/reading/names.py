"""What are blocks, sites and branches called? Module calls and the numbers in their paths give names, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, pairwise

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import Graph, Value
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import MATRICES, weights_of

ATTENTION = re.compile(r"att|mixer|ssm|mamba|rnn|gru|lstm|recur", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn?\b|feed|expert|moe|dense|fc\b", re.IGNORECASE)


class Names:
    """The names of the branches of one memory."""

    def __init__(self, memory: Memory, branches: Sequence[Branch]):
        self.graph, self.memory, self.branches = memory.graph, memory, list(branches)
        self._insides = [self._inside(branch) for branch in branches]
        self._around = self._common_call()
        self.paths = [self._path(number) for number in range(len(branches))]
        self.layers = _numbered(self._keys())

    def _inside(self, branch: Branch) -> list[Value]:
        """The operations of a branch."""
        reads = {read.number for read in branch.reads}
        found: dict[int, Value] = {}
        waiting = [branch.source]
        while waiting:
            value = waiting.pop()
            if (
                value.number in found
                or value.number in reads
                or not self.graph.depends(value, self.memory.root)
            ):
                continue
            if self.memory.holds(value) and value is not branch.source:
                continue
            found[value.number] = value
            waiting += value.parents
        return [found[number] for number in sorted(found, reverse=True)]

    def _common_call(self) -> list[int]:
        """The module calls that contain all branches."""
        stacks = [self.graph.stack(v) for inside in self._insides for v in inside[:1]]
        common = stacks[0] if stacks else []
        for stack in stacks[1:]:
            same = next((n for n, (a, b) in enumerate(zip(common, stack, strict=False)) if a != b), None)
            common = common[: min(len(stack), len(common)) if same is None else same]
        if len(self.branches) == 1 and common:
            common = common[:-1]
        return common

    def unit(self, number: int) -> int | None:
        """The outermost call inside of the common one in which a branch runs; None where it runs in none."""
        depth = len(self._around)
        # The latest operations come first: before them may lie those of other branches, as of another track.
        units = (stack[depth] for v in self._insides[number] if len(stack := self.graph.stack(v)) > depth)
        return next(units, None)

    def _path(self, number: int) -> str:
        """The outermost module call whose work a branch is."""
        stacks = [self.graph.stack(v) for v in self._insides[number] if v.name in MATRICES or weights_of(v)]
        stacks = stacks or [self.graph.stack(self.branches[number].source)]
        common = stacks[0]
        for stack in stacks[1:]:
            common = [a for a, b in zip(common, stack, strict=False) if a == b]
        others = {
            call for other in range(len(self.branches)) if other != number
            for v in self._insides[other][:1] for call in self.graph.stack(v)
        }  # fmt: skip
        own = [call for call in common if call not in others]
        call = own[0] if own else common[-1] if common else 0
        path = self.graph.calls[call].path
        return path if path else self._parameter_path(number)

    def _parameter_path(self, number: int) -> str:
        """Where no module is called: the owner of the branch's first parameter."""
        weights = [w for v in self._insides[number] for w in weights_of(v)]
        names = sorted(self.graph.parameter_names.get(w.number, "") for w in weights)
        return names[0] if names else ""

    def kind(self, number: int) -> str:
        """Attention, feed-forward, or the module's own name."""
        path = self.paths[number]
        last = [part for part in path.split(".") if not part.isdigit()]
        words = " ".join([*last[-1:], *self._class_of(path)])
        if ATTENTION.search(words):
            return "attn"
        if MLP.search(words):
            return "mlp"
        names = {v.name for v in self._insides[number]}
        if any("attention" in name for name in names) or {"_softmax", "bmm"} <= names:
            return "attn"
        return last[-1] if last else "branch"

    def _class_of(self, path: str) -> list[str]:
        return [call.kind for call in self.graph.calls if call.path == path][:1]

    def _keys(self) -> list[tuple[object, ...]]:
        """What branches of one block have in common: the numbers of the containers, or the call of the block."""
        around = self.graph.calls[self._around[-1]].path if self._around else ""
        found = []
        for number in range(len(self.branches)):
            unit = self.unit(number)
            path = self.paths[number] if unit is None else self.graph.calls[unit].path
            inner = path[len(around) :] if path.startswith(around) else path
            digits = tuple(int(part) for part in inner.split(".") if part.isdigit())
            digits = digits or tuple(int(part) for part in path.split(".") if part.isdigit())
            call = self.graph.calls[unit].index if unit is not None else 0
            found.append((digits, call, unit, path))
        return self._cut_keys(found)

    def _cut_keys(self, found: list[tuple]) -> list[tuple[object, ...]]:  # type: ignore[type-arg]
        """The digits as far as they number blocks: a container whose members are of several classes holds branches."""
        keys: list[tuple[object, ...]] = []
        kinds: dict[int, set[str]] = {}
        for _digits, _, unit, path in found:
            level = len([part for part in path.split(".") if part.isdigit()])
            kinds.setdefault(level, set()).add(self.graph.calls[unit].kind if unit is not None else path)
        for digits, call, unit, _path in found:
            if len(digits) > 1 and len(kinds.get(len(digits), ())) > 1:
                digits = digits[:-1]
            if digits:
                keys.append((digits, call))
            else:
                keys.append(((), call if self._is_repeated(unit) else unit))
        return keys

    def _is_repeated(self, unit: int | None) -> bool:
        return unit is not None and any(
            call.path == self.graph.calls[unit].path and call.index for call in self.graph.calls
        )


def _numbered(keys: list[tuple]) -> list[int]:  # type: ignore[type-arg]
    """Block numbers: the containers' own where these ascend by one, else the order of the blocks."""
    groups = [key for key, _ in groupby(keys)]
    order, number = [], -1
    for _, group in groupby(keys):
        number += 1
        order += [number] * len(list(group))
    if all(len(key[0]) == 1 and not key[1] for key in groups):
        digits = [key[0][0] for key in groups]
        if all(b - a == 1 for a, b in pairwise(digits)) and digits[0] >= 0:
            return [key[0][0] for key in keys]
    return order


def labels(
    graph: Graph, cuts: Sequence[Sequence[Value]], branches: Sequence[Branch], layers: Sequence[int]
) -> list[tuple[int, str]]:
    """The block and site of each state, from the branches that were written before it and those that read after it."""
    found: list[tuple[int, str]] = []
    for number, cut in enumerate(cuts):
        moment = max(value.number for value in cut)
        written = [layer for b, layer in zip(branches, layers, strict=True) if b.writes[0].number <= moment]
        coming = [layer for b, layer in zip(branches, layers, strict=True) if b.writes[0].number > moment]
        found.append(_label(number, written, coming, found))
    return found


def _label(
    number: int, written: list[int], coming: list[int], before: list[tuple[int, str]]
) -> tuple[int, str]:
    if not written:
        return (-1, "embed") if number == 0 else (min(coming, default=0), "pre")
    layer = max(written)
    if layer in coming:
        return layer, "mid"
    if (layer, "post") in before:
        return (min(coming), "pre") if coming else (layer, "post")
    return layer, "post"


def name_of(memory: Memory, names: Names) -> str:
    """What a memory is called: the container of its blocks, else the module around them."""
    paths = [path for path in names.paths if path]
    if not paths:
        return "model"
    parts = [path.split(".") for path in paths]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    while common and common[-1].isdigit():
        common.pop()
    return ".".join(common) or "model"
