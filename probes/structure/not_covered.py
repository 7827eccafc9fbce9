"""What ran in a forward and lies in no chain? Towers with blocks, and parts with many of the parameters, each with the reason.

A model may have several towers, and not all of them can be read: each that is left out is named, so that no run looks complete
that is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from depthscope.probes.model.modules import all_parameters, module_paths, named_parameters
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, ModuleCall, TracedValue, container_of, walk
from depthscope.probes.reading.operations import MATRICES, NORMS, only_moves, weights
from depthscope.probes.reading.proof import further_residuals
from depthscope.probes.structure.chain import Chain, ChainError, block_paths

# A further chain, such as a decoder, needs this much of the largest one; smaller ones are parts of heads. A heuristic of ours.
FURTHER_SHARE = 0.1
# Parts without repeated blocks are named from this share of the parameters on; a heuristic of ours. Below it are projectors,
# stems and heads, of which a forward has many.
NAMED_SHARE = 0.2
# A block computes something: it has a matrix to go in and one to come out, unlike a convolution with its norm.
LEAST_MATRICES = 2


@dataclass(frozen=True)
class LeftOut:
    """A part of the model that ran and lies in no chain."""

    module: str  # its path
    blocks: int = 0  # how many blocks of one class ran in it; 0 where none are repeated
    block: str = ""  # their class
    share: float = 0.0  # of the parameters that ran, those of embeddings and heads for a vocabulary left out
    why: str = ""  # no chain has it
    layers: str = ""  # the pattern that names its blocks; empty where one pattern does not

    @property
    def sentence(self) -> str:
        """The part, its size and the reason as a sentence."""
        blocks = f"{self.blocks} blocks of {self.block}, " if self.blocks else ""
        advice = f"; layers={self.layers!r} names its blocks" if self.layers else ""
        size = f" ({blocks}{self.share:.0%} of the parameters)" if blocks or self.share else ""
        return f"{self.module}{size}: {self.why}{advice}"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, with the sentence."""
        return {**asdict(self), "sentence": self.sentence}


class UsedParameters:
    """The parameters that a forward took, by identity; of embeddings and heads, in small models most, with the size 0."""

    def __init__(self, graph: Graph, own: Mapping[str, nn.Parameter]):
        used = {own[name] for name in graph.parameter_names.values() if name in own}
        outside, vocabularies = set[str](), set[int]()
        taken = [(graph.values[number], of) for number, of in weights(graph).items()]
        for value, of in taken:
            if value.name == "embedding":
                outside |= {graph.parameter_names.get(w.number, "") for w in of}
                vocabularies.add(value.args[0].shape[0])
        for value, of in taken:
            if value.name in MATRICES or value.name == "linear":
                heads = (w for w in of if not vocabularies.isdisjoint(w.shape[:1]))
                outside |= {graph.parameter_names.get(w.number, "") for w in heads}
        ends = {id(own[name]) for name in outside if name in own}
        self.sizes = {id(p): 0 if id(p) in ends else p.numel() for p in used}
        self._within: dict[nn.Module, set[int]] = {}

    def within(self, module: nn.Module) -> set[int]:
        """Those of a module and its parts."""
        if module not in self._within:
            self._within[module] = set(map(id, all_parameters(module))) & self.sizes.keys()
        return self._within[module]

    def share(self, parameters: Iterable[int]) -> float:
        """What some parameters are of all that were used, between 0 and 1."""
        return sum(self.sizes[parameter] for parameter in parameters) / (sum(self.sizes.values()) or 1)


class PartsLeftOut:
    """A walk through the modules of a model, down to those of which nothing lies in a chain."""

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        chains: Sequence[Chain],
        # The blocks of other proven memories, by the names with which `chain=` reads them
        others: Mapping[str, set[str]],
        *,
        named: bool,  # whether the user named the blocks
    ):
        read = [memory for chain in chains for memory in chain.memories]
        self._model, self._chains, self._others, self._named = model, chains, others, named
        points = [point for chain in chains for point in chain.points]
        self._show_states = {p.module for p in points} | {p.path for p in points if p.at == "output"}
        self._modules: dict[str, nn.Module] = dict(module_paths(model, shared=True))
        self._own = own = named_parameters(self._modules)
        self._used = UsedParameters(graph, own)
        self._calls: dict[str, list[ModuleCall]] = {}
        for call in graph.calls:
            self._calls.setdefault(call.path, []).append(call)
        ends = ((call, graph.ends_of(number)) for number, call in enumerate(graph.calls))
        self._same_shape = {call for call, of in ends if of is not None and of[0].shape == of[1].shape}
        blocks = {path for chain in chains for path in chain.blocks}
        blocks |= {
            path for chain in chains for c in chain.connections for path in (c.path, c.branch_path or "")
        }
        blocks -= set[str]().union(*(_around(graph, memory) for memory in read))
        blocks &= self._modules.keys() - {""}
        in_blocks = set[int]().union(*(self._used.within(self._modules[path]) for path in blocks))
        self._further = deep = [*further_residuals(graph, read, blocks)]
        # Parameters of residuals that lie in no block: those of what is added, and of the branches of chains around them.
        self._deepest = self._ids(of.names for of in deep) - in_blocks
        self._inside = self._ids(of.around for of in deep) - in_blocks
        self._deep = self._deepest | self._inside
        self._known = set[int]()  # the parameters of parts that are named
        self._on_chains = (self._ids(memory.parameters for memory in read) - self._deep) | in_blocks

    def _ids(self, names: Iterable[Collection[str]]) -> set[int]:
        """The parameters that were used and have some names."""
        found = {id(self._own[name]) for of in names for name in of if name in self._own}
        return found & self._used.sizes.keys()

    def found(self) -> list[LeftOut]:
        """Every part that is to be named."""
        parts = (part for part in self._parts("", self._model) if part is not None)
        return [*parts, *self._without_modules()]

    def _without_modules(self) -> Iterator[LeftOut]:
        """What is said of residuals whose parameters belong to no part of the model."""
        unnamed = [
            of for of in map(self._ids, ([of.names] for of in self._further)) if of.isdisjoint(self._known)
        ]
        rest = self._deepest & set[int]().union(*unnamed)
        names = [name for name, of in self._own.items() if id(of) in rest and of.ndim > 1]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield LeftOut(f"{names[0]}{more}", 0, "", self._used.share(rest), self._reason(rest, ()))
        for of in self._further:  # a track between blocks, by parts of them that add to a chain too
            if of.sums > 1 and self._ids([of.names]) <= self._on_chains:
                why = (
                    f"{of.sums} sums of a value and of what was computed from it lie between the blocks that are read, and "
                    "are none of their states"
                )
                yield LeftOut(of.path or "model", why=why)

    def _parts(self, path: str, module: nn.Module) -> Iterator[LeftOut | None]:
        """What is to be named of a module of which a part lies in a chain."""
        alone: list[str] = []
        read = {
            type(child)
            for name, child in module.named_children()
            if name.isdigit() and self._used.within(child) & self._on_chains
        }
        for name, child in module.named_children():
            inner, used = f"{path}.{name}".lstrip("."), self._used.within(child)
            if not used or used <= self._on_chains:
                continue
            shows_state = any(f"{path}.".startswith(f"{inner}.") for path in self._show_states)
            if used & self._on_chains or (shows_state and used & self._deep and not used <= self._deep):
                yield from self._parts(inner, child)
            elif not shows_state or used <= self._deep:  # what joins two stages gives a state
                alone.append(inner)
        by_class: dict[type, list[str]] = {}
        for inner in filter(self._is_block, alone):
            by_class.setdefault(type(self._modules[inner]), []).append(inner)
        together = [group for group in by_class.values() if len(group) > 1]
        for group in together:
            # Named after all of them: the container has other blocks, which lie in a chain.
            yield self._left_out(f"{group[0]} … {group[-1]}" if path else group[0], group, group)
        taken = {inner for group in together for inner in group}
        for inner in (inner for inner in alone if inner not in taken):
            # Stages next to those that are read are named, however small.
            is_stage = inner.rpartition(".")[2].isdigit() and type(self._modules[inner]) in read
            least = 0.0 if is_stage else NAMED_SHARE
            yield self._left_out(inner, [inner], self._blocks_within(inner), least)

    def _blocks_within(self, path: str) -> list[str]:
        """The modules of the class of blocks that has most of a module's parameters, where they are repeated."""
        by_class: dict[type, list[str]] = {}
        for other in self._calls:
            if (other == path or other.startswith(f"{path}.")) and other in self._modules:
                by_class.setdefault(type(self._modules[other]), []).append(other)
        # The first block of a stage may change the shape.
        repeated = [
            of for of in by_class.values() if self._num_calls(of) > 1 and any(map(self._is_block, of))
        ]
        return max(repeated, key=lambda of: len(self._own_of(of)), default=[])

    def _num_calls(self, paths: Sequence[str]) -> int:
        return sum(len(self._calls[path]) for path in paths)

    def _own_of(self, paths: Sequence[str]) -> set[int]:
        return {parameter for path in paths for parameter in self._used.within(self._modules[path])}

    def _is_block(self, path: str) -> bool:
        """Whether a module may be a block: it gives what it takes in shape, and has parts with matrices, or in a residual."""
        if path not in self._modules or self._same_shape.isdisjoint(self._calls.get(path, ())):
            return False
        modules = [module for _, module in module_paths(self._modules[path])]
        matrices = [
            p for module in modules for p in module._parameters.values() if p is not None and p.ndim > 1
        ]
        is_deep = not self._deepest.isdisjoint(self._used.within(self._modules[path]))
        return len(modules) > 1 and (is_deep or len(matrices) >= LEAST_MATRICES)

    def _left_out(
        self, name: str, paths: Sequence[str], blocks: Sequence[str], least: float = NAMED_SHARE
    ) -> LeftOut | None:
        own = self._own_of(paths)
        share = self._used.share(own)
        single = all(not any(True for _ in self._modules[path].children()) for path in paths)
        is_deep = not own.isdisjoint(self._deepest if single else self._deep)
        is_deep &= any(parameter.ndim > 1 for path in paths for parameter in self._modules[path].parameters())
        if not blocks and not is_deep and (share < least or single):  # one layer has no depth
            return None
        self._known |= own
        pattern, *others = {re.sub(r"\d+(?=\D*$)", "{i}", path) for path in blocks} or {""}
        is_clear = "{i}" in pattern and not others and set(block_paths(self._model, [pattern])) == set(blocks)
        return LeftOut(
            module=name,
            blocks=self._num_calls(blocks),
            block=type(self._modules[blocks[0]]).__name__ if blocks else "",
            share=share,
            why=self._reason(own, blocks),
            layers=pattern if is_clear else "",
        )

    def _reason(self, own: AbstractSet[int], blocks: Sequence[str]) -> str:
        ways = (  # how their chain can be read, if it was found and proven
            f"; chain={name!r} reads it in their place"
            for name, of in self._others.items()
            if any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in of for b in blocks)
        )
        way = next(ways, "")
        if self._named and blocks:
            return "layers= names other blocks"
        if not own.isdisjoint(self._inside):
            return f"it lies inside of one branch of the chain that is read{way}"
        if not blocks:
            return "no blocks follow one another in it"
        if any(chain.has_streams or chain.history for chain in self._chains):
            return f"of a model whose states have connections, the chain that has them is read alone{way}"
        if self._used.share(self._own_of(blocks)) < FURTHER_SHARE * self._used.share(self._on_chains):
            return f"its blocks have less than {FURTHER_SHARE:.0%} of the parameters of the blocks that are read{way}"
        if way:
            return f"it is another chain than the one that is read{way}"
        return "no chain of its states was found, or none that is proven"


def _around(graph: Graph, memory: MemoryReading) -> set[str]:
    """The modules in one call of which a memory begins and ends: none is one of its blocks."""
    ends = (graph.values[memory.root], graph.values[memory.end])
    first, last = (set(graph.stack(value)) for value in ends)
    return {graph.calls[call].path for call in first & last}


def missing_state(graph: Graph, chains: Sequence[Chain]) -> str:
    """A block next to those of plain chains and of their class that takes or gives none of their states; empty for none."""
    for chain in chains:
        for before, point in pairwise(point for point in chain.points if point.site == "post"):
            if point.layer == before.layer and point.module not in graph.modules:
                return (
                    f"{point.module}, which is not a module, gives a second state after block {point.layer}"
                )
    memories = [memory for chain in chains for memory in chain.memories]
    known = {number for memory in memories for state in memory.states for number in state.values}
    known |= {point.number for chain in chains for point in chain.points}
    # What has the elements of a state in another order is one; parts of it are shown, as of two states in one.
    moved = walk(map(graph.values.__getitem__, known), lambda of: filter(only_moves, graph.takers(of)))
    known = {of.number for of in moved}
    branches = [branch for memory in memories for branch in memory.branches]
    known |= {number for branch in branches for number in branch.way}
    # What a branch reads in the middle of a step, as of a solver's second evaluation, is proven next to the states.
    reads = {value for branch in branches for value in branch.inputs if value.func is not None}
    carried = {number for memory in memories for number in memory.carried}
    missing = {read.number for read in reads if _is_between_states(graph, read, known, carried)}
    known |= {read.number for read in reads} - missing
    # What a branch reads of a state may be carried too, as by a norm in single operations.
    sources = {branch.source.number for branch in branches}  # which may be a part of the memory by themselves
    inside = graph.earlier([graph.values[number] for number in sources], (known | missing) - sources)
    works = {
        f"{path}." for b in branches for path in (b.path, graph.calls[b.unit].path if b.unit >= 0 else b.path)
    }
    # A layer before the first branch, or between stages, is no block.
    blocks = {path for chain in chains for path in chain.blocks if path[-1:].isdigit()}
    blocks = {path for path in blocks if any(work.startswith(f"{path}.") for work in works)}
    like = {(path.rpartition(".")[0], graph.modules.get(path)) for path in blocks}
    sides = sorted(graph.sides.items())
    # Of several values that a block gives, those in whose place blocks that are read give a state or what is added to it.
    of_blocks = [values for (call, _), values in sides if graph.calls[call].path in blocks]
    items = {n for values in of_blocks for n, value in enumerate(values) if value.number in known}
    for (call, at), values in sides:
        path = graph.calls[call].path
        values = [value for n, value in enumerate(values) if n in items or len(values) == 1]
        is_like = path[-1:].isdigit() and (path.rpartition(".")[0], graph.modules.get(path)) in like
        counts = not any(inside[v.number] for v in values) and any(map(graph.reaches_output, values))
        if is_like and counts and not any(v.number in known for v in values):
            return f"{path} {'takes' if at == 'input' else 'gives'} no state of the chain"
    return ""


def _is_between_states(graph: Graph, read: TracedValue, states: set[int], carried: set[int]) -> bool:
    """Whether a read is no state, and should be one: a norm between blocks makes it of a state, and the next is made of it."""
    if read.number in states:
        return False
    made_of = walk(
        [read], lambda value: (p for p in value.parents if p.number in carried and p.number not in states)
    )
    if not any(value.name in NORMS for value in made_of):
        return False
    later = walk([read], lambda value: (of for of in graph.takers(value) if of.number in carried))
    return any(value.number in states for value in later)


def require_all_blocks(graph: Graph, chain: Chain) -> None:
    """Refuse a forward that left out some of its blocks: their depths would be given to others."""
    ran = set[str]()
    for call in graph.calls:
        parts = call.path.split(".")
        ran.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    numbered = {path: (container_of(path), kind) for path, kind in graph.modules.items()}
    like = {of for path in chain.blocks if (of := numbered.get(path, (None, ""))) and of[0] is not None}
    missing = [path for path, of in numbered.items() if of in like and path not in ran]
    if missing:
        raise ChainError(
            f"{', '.join(missing[:3])} did not run in this forward, and blocks like it did (layer drop leaves blocks out "
            "in training mode, for one); measure in evaluation mode, or name the blocks that run with layers="
        )


def states_without_gradients(chain: Chain) -> Iterator[LeftOut]:
    """What is said of states of which autograd has another gradient, or a part of it alone."""
    shown = [
        (depth, of.without_gradient)
        for depth, point in enumerate(chain.points)
        for of in (point.streams or (point,))
    ]
    for why in dict.fromkeys(why for _, why in shown if why):
        depths = list(dict.fromkeys(depth for depth, of in shown if of == why))
        names = ", ".join(map(str, depths))
        yield LeftOut(chain.points[depths[0]].module, why=f"no gradients of the states {names}: {why}")
