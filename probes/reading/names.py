"""What are blocks, sites and branches called? Module calls and the numbers in their paths give names, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from typing import NamedTuple, TypeVar

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import TracedValue, container_of, walk
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import LAYERS, only_moves, weights

Part = TypeVar("Part", int, str)
ATTENTION = re.compile(r"att|mixer|ssm|mamba|rnn|gru|lstm|recur", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn?\b|feed|expert|moe|dense|fc\b", re.IGNORECASE)


class BranchNames:
    """The names of the branches of one memory."""

    def __init__(self, memory: Memory, branches: Sequence[Branch]):
        self.graph, self.memory, self.branches = memory.graph, memory, list(branches)
        self._weights = weights(memory.graph)
        self._repeated = {call.path for call in self.graph.calls if call.number}
        self._insides = [self._inside(branch) for branch in branches]
        self._around = self._common_call()
        self._stacks = [set(self.graph.stack(v)) for inside in self._insides for v in inside[:1]]
        self._shared = Counter(call for stack in self._stacks for call in stack)
        for branch, inside in zip(self.branches, self._insides, strict=True):
            branch.unit = self._unit(inside)
        for number, branch in enumerate(self.branches):
            calls = self._own_calls(number)
            branch.path = self.graph.calls[calls[0]].path  # of the outermost module call whose work it is
            if not branch.path:  # where no module is called, the owner of its first parameter
                used = [w for v in self._insides[number] for w in self._weights.get(v.number, ())]
                branch.path = min((self.graph.parameter_names.get(w.number, "") for w in used), default="")
            branch.kind = self._kind(
                number, [branch.path, *(self.graph.calls[call].path for call in calls[1:])]
            )
        self.between: set[int] = set()  # the sources of branches that lie in no block, next to blocks
        self.first_layer = -1  # of the block that made the first value; -1 where none did
        self.scaled: list[tuple[int, int]] = []  # what blocks without a branch give, and their layers

    def _inside(self, branch: Branch) -> list[TracedValue]:
        """The operations of a branch."""
        memory, later, reads = self.memory, self.graph.later(self.memory.root), set(branch.reads)

        def before(value: TracedValue) -> Iterator[TracedValue]:
            return (p for p in value.parents if later[p.number] and p not in reads and not memory.holds(p))

        return sorted(walk([branch.source], before), key=lambda value: -value.number)

    def _common_call(self) -> list[int]:
        """The module calls that contain all branches, but for a few that lie in no block with a number."""
        stacks = [self.graph.stack(v) for inside in self._insides for v in inside[:1]]
        common = shared_start(stacks)
        numbered = [stack for stack in stacks if any(self.graph.calls[c].container for c in stack)]
        if 4 * len(numbered) >= 3 * len(stacks) > 3:
            common = max(common, shared_start(numbered), key=len)
        if len(self.branches) == 1:  # the block is the call in which its output is added
            writes = self.graph.stack(self.branches[0].writes[0])
            common = shared_start([common, writes])
            common = common[:-1] if len(common) > 1 else common
        return common

    @cached_property
    def steps_alone(self) -> dict[int, tuple[list[int], int | None]]:
        """What changes the memory without a branch, by its last value: steps, and the call of the block they are, if any."""
        graph, memory = self.graph, self.memory
        units = {branch.unit for branch in self.branches} - {-1}
        containers = {graph.calls[unit].container for unit in units} - {None}

        def shown(value: TracedValue, at: str) -> set[int]:
            of = (show.call for show in graph.shown.get(value.number, ()) if show.at == at)
            return {call for call in of if graph.calls[call].container in containers}

        found: dict[int, tuple[list[int], int | None]] = {}
        for end in sorted(memory.trunk if containers else ()):
            given = shown(graph.values[end], "output") - units
            if not (given or shown(graph.values[end], "input")):
                continue
            steps: list[int] = []
            for value in memory.line(graph.values[end]):
                begun = given & shown(value, "input") if given else shown(value, "output")
                if begun or value.number in memory.writes or memory.mixes(value):
                    break
                steps.insert(0, value.number)
            if begun and any(not only_moves(graph.values[n]) for n in steps):
                found[end] = steps, max(given, default=None)
        return found

    def _unit(self, inside: Sequence[TracedValue]) -> int:
        """The outermost call inside of the common one in which a branch runs; -1 where it runs in none."""
        depth = len(self._around)
        # The latest layers come first, without a norm after them: before may lie those of other branches, as of another track.
        works = [value for value in inside if value.name in LAYERS]
        stacks = map(self.graph.stack, works or inside)
        units = (stack[depth] for stack in stacks if len(stack) > depth and stack[:depth] == self._around)
        return next(units, -1)

    def _own_calls(self, number: int) -> list[int]:
        """The module calls whose work a branch is, the outermost first."""
        unit, depth, inside = self.branches[number].unit, len(self._around), self._insides[number]
        works = [v for v in inside if v.name in LAYERS]  # its norm may lie next to it
        works = works or [v for v in inside if v.number in self._weights]
        stacks = [self.graph.stack(v) for v in works]
        # Before it may lie the work of other branches, as of another track.
        stacks = [stack for stack in stacks if len(stack) > depth and stack[depth] == unit]
        stacks = stacks or [self.graph.stack(self.branches[number].source)]
        common = shared_start(stacks)
        # Those that contain no other branch.
        mine = self._stacks[number]
        own = [call for call in common if call not in self._around and self._shared[call] == (call in mine)]
        return own or common[-1:] or [0]

    def _kind(self, number: int, paths: Sequence[str]) -> str:
        """attn, mlp or block. ``paths``: of the modules whose work the branch is."""
        kinds = [kind_of(path, self.graph.modules) for path in paths]
        names = {v.name for v in self._insides[number]}
        if kinds[0] == "block" and (
            any("attention" in name for name in names) or {"_softmax", "bmm"} <= names
        ):
            return "attn"
        return next((kind for kind in kinds if kind != "block"), "block")

    @cached_property
    def keys(self) -> list[Key]:
        """What branches of one block have in common: the numbers of its containers, or its call."""
        units = ((branch.unit, branch.path) for branch in self.branches)
        return [self._key(path if unit < 0 else self.graph.calls[unit].path, unit) for unit, path in units]

    def _key(self, path: str, unit: int) -> Key:
        around = self.graph.calls[self._around[-1]].path if self._around else ""
        parts = path.split(".")
        skipped = len(around.split(".")) if around and path.startswith(around) else 0
        places = [n for n, part in enumerate(parts) if part.isdigit()]
        places = [n for n in places if n >= skipped] or places
        if len(places) > 1 and self._holds_branches(parts[: places[-1]]):
            places = places[:-1]
        digits = tuple(int(parts[n]) for n in places)
        call = 0 if unit < 0 else self.graph.calls[unit].number
        if digits:
            return Key(digits, call, ".".join(parts[: places[-1]]))
        if unit < 0:
            return Key((), 0, "")
        alone = path if self.graph.modules.get(path) in self._numbered_classes else ""
        return Key((), call if path in self._repeated else unit, alone)

    @cached_property
    def _numbered_classes(self) -> set[str | None]:
        """The classes of the modules with a number in which branches run: one that has none may be a block like them."""
        paths = {self.graph.calls[branch.unit].path for branch in self.branches if branch.unit >= 0}
        return {self.graph.modules.get(path) for path in paths if path.rpartition(".")[2].isdigit()}

    def _holds_branches(self, container: list[str]) -> bool:
        """Whether the numbered members of a container are branches of a block: each has other parts, in all containers."""
        members = self._members(".".join(container))
        if len(set(members)) < max(len(members), 2) or not container[-1].isdigit():
            return False
        around = ".".join(container[:-1])
        others = [p for p in self.graph.modules if container_of(p) == around]
        return len(others) > 1 and all(self._members(other) == members for other in others)

    def _members(self, container: str) -> list[tuple[str, ...]]:
        """The classes of all parts of each numbered member of a container."""
        return [tuple(kinds) for kinds in self._numbered_members.get(container, {}).values()]

    @cached_property
    def _numbered_members(self) -> dict[str, dict[str, list[str]]]:
        found: dict[str, dict[str, list[str]]] = {}
        for path, kind in self.graph.modules.items():
            parts = path.split(".")
            for at, name in enumerate(parts):
                if name.isdigit():
                    members = found.setdefault(".".join(parts[:at]), {})
                    members.setdefault(name, []).append(kind)
        return found

    def number(self, modules: Mapping[str, str], first: int | None = None) -> None:
        """Number the blocks of branches together with those that have none, from ``first`` on if that is given."""
        keys, places = [*self.keys], dict[int, int]()
        for end, (_, call) in self.steps_alone.items():
            if call is not None:
                places[end] = len(places) + sum(branch.writes[-1].number < end for branch in self.branches)
                keys.insert(places[end], self._key(self.graph.calls[call].path, call))
        layers = numbered(keys, modules)
        layers = layers if first is None else [first + layer - layers[0] for layer in layers]
        self.scaled = [(end, layers[at]) for end, at in places.items()]
        of_branches = (layer for at, layer in enumerate(layers) if at not in places.values())
        for branch, layer in zip(self.branches, of_branches, strict=True):
            branch.layer = layer

    def key_of_root(self) -> Key | None:
        """The block that made the first value, as the first block of a stage makes it with a shortcut of its own."""
        stack = self.graph.stack(self.memory.root)
        if len(stack) <= len(self._around):
            return None
        unit = stack[len(self._around)]
        key = self._key(self.graph.calls[unit].path, unit)
        like = self.keys[0]
        return key if key.container == like.container and key.digits and key.digits != like.digits else None


def shared_start(stacks: Sequence[list[Part]]) -> list[Part]:
    """The calls with which all stacks begin, or the parts of some paths."""
    levels = zip(*stacks, strict=False)
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]


def kind_of(path: str, modules: Mapping[str, str]) -> str:
    """Whether a module is attention or feed-forward, by its name and class; block where neither tells."""
    words = " ".join([*[part for part in path.split(".") if not part.isdigit()][-1:], modules.get(path, "")])
    return "attn" if ATTENTION.search(words) else "mlp" if MLP.search(words) else "block"


class Key(NamedTuple):
    """What branches of one block have in common."""

    digits: tuple[int, ...]
    call: int
    container: str  # of a block without a number, which is of the class of those that have one, its own path

    @property
    def is_block(self) -> bool:
        """Whether it is that of a block, next to which other branches have none."""
        return bool(self.digits or self.container)

    def block(self) -> tuple[object, ...]:
        """What is the same for all branches of a block, whose modules may lie in a list each."""
        return self.digits, self.call


def numbered(keys: Sequence[Key], modules: Mapping[str, str]) -> list[int]:
    """Block numbers: the containers' own where these ascend, without those that did not run; else the order of the blocks."""
    blocks = [key for key in keys if key.is_block] or list(keys)
    own = iter(_of_blocks(blocks, modules))
    found: list[int] = []
    for key in keys:  # what has no number, next to blocks that have one, belongs to the block before it
        found.append(next(own) if key in blocks else found[-1] if found else -1)
    return found


def _of_blocks(keys: Sequence[Key], modules: Mapping[str, str]) -> list[int]:
    groups = [next(group) for _, group in groupby(keys, Key.block)]
    counted = all(len(key.digits) == 1 and not key.call for key in groups)
    if counted and all(_follows(a, b, modules) for a, b in pairwise(groups)):
        return [key.digits[0] for key in keys]
    order: list[int] = []
    for number, (_, group) in enumerate(groupby(keys, Key.block)):
        order += [number] * len(list(group))
    return order


def _follows(a: Key, b: Key, modules: Mapping[str, str]) -> bool:
    (first,), (second,) = a.digits, b.digits
    kinds = {modules.get(f"{a.container}.{n}") for n in range(first, second + 1)}
    return second == first + 1 or (len(kinds) == 1 and None not in kinds)


def number_blocks(all_names: Sequence[BranchNames]) -> None:
    """Number the blocks of memories; the blocks of a later stage follow those of the stage before."""
    for names in all_names:
        keys = names.keys
        if any(key.digits for key in keys):
            outside = (branch for branch, key in zip(names.branches, keys, strict=True) if not key.is_block)
            names.between = {branch.source.number for branch in outside}
        names.number(names.graph.modules)
    for before, names in pairwise(sorted(all_names, key=lambda names: names.memory.root.number)):
        root = names.key_of_root()
        if root is None or not names.graph.depends(names.memory.root, before.memory.end):
            continue
        units = {branch.unit for branch in before.branches}
        # The block in which that ended
        is_known = bool(units.intersection(names.graph.stack(names.memory.root)))
        names.first_layer = max(branch.layer for branch in before.branches) + (not is_known)
        names.number({}, names.first_layer + 1)


def labels(names: BranchNames, cuts: Sequence[Sequence[TracedValue]]) -> list[tuple[int, str]]:
    """The block and site of each state, from the branches that were written before it and those that write after it."""
    found: list[tuple[int, str]] = []
    written = [(b.writes[0].number, b.layer, b.source.number in names.between) for b in names.branches]
    waiting = sorted([*written, *((end, layer, False) for end, layer in names.scaled)], reverse=True)
    coming = Counter(layer for _, layer, is_between in waiting if not is_between)
    layer = None  # the highest one that was written
    for number, cut in enumerate(cuts):
        moment = max(value.number for value in cut)
        while waiting and waiting[-1][0] <= moment:
            _, of, is_between = waiting.pop()
            layer = of if layer is None else max(layer, of)
            coming[of] -= not is_between
            if not coming[of]:
                del coming[of]
        if number == 0 and layer is None and names.first_layer >= 0:
            found.append((names.first_layer, "post"))
        else:
            found.append(_label(number, layer, coming, found))
    return found


def _label(
    number: int, layer: int | None, coming: Collection[int], before: list[tuple[int, str]]
) -> tuple[int, str]:
    if layer is None:
        return (-1, "embed") if number == 0 else (min(coming, default=0), "pre")
    if layer < 0:  # what is added before the first block
        return -1, "embed"
    if layer in coming:
        return layer, "mid"
    if (layer, "post") in before[-2:]:
        return (min(coming), "pre") if coming else (layer, "post")
    return layer, "post"


def name_of(names: BranchNames) -> str:
    """What a memory is called: the container of its blocks, else the module around them."""
    common = shared_start([branch.path.split(".") for branch in names.branches if branch.path])
    while common and common[-1].isdigit():
        common.pop()
    return ".".join(common) or "model"
