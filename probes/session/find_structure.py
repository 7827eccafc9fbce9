"""What is a model? Its chains, layouts and connections, from the reading of the graph of one recorded forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import DepthWeights, Parts, StreamConnectionError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.layout import LayoutError, canonical, count_streams, parse_layout
from depthscope.probes.model.modules import module_paths
from depthscope.probes.model.sequence_shards import TokenShards
from depthscope.probes.reading.description import PROVEN, ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import INPUT, Graph, TracedValue, container_of
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.read import Rereading
from depthscope.probes.session.first_forward import RewrittenError
from depthscope.probes.session.options import Options
from depthscope.probes.structure.branch_scales import branch_scales
from depthscope.probes.structure.chain import Chain, ChainError, HookPoint
from depthscope.probes.structure.final_norm import final_norm
from depthscope.probes.structure.missing_states import missing_state
from depthscope.probes.structure.model_structure import Structure
from depthscope.probes.structure.named_blocks import (
    ASSERTED,
    block_labels,
    chain_of_calls,
    likely_blocks,
    linked_calls,
    named_calls,
    states_around,
)
from depthscope.probes.structure.not_covered import FURTHER_SHARE, LeftOut, not_covered
from depthscope.probes.structure.read_chains import ChainReader, ReadChain, repeats_first
from depthscope.probes.structure.read_layout import num_fractions, read_layout, shape_layout
from depthscope.probes.structure.read_parts import ReadStructure, depth_family
from depthscope.probes.structure.sequence_axis import SequenceAxis
from depthscope.probes.structure.stages import joined, with_ending, with_made_state, with_opening
from depthscope.probes.structure.tape import value_at


class AxisError(RewrittenError):
    """The sequences of the first forward were counted along the wrong axis."""


class StructureFinder:
    """The structure of a model, by one recorded forward.

    ``options``: what the user names of the structure, and asks for.
    ``batch_size``, ``batch_axis``: how many sequences there are, along which axis of what the model was called with.
    """

    def __init__(self, graph: Graph, model: nn.Module, options: Options, batch_size: int, batch_axis: int):
        self.graph, self.model, self.options = graph, model, options
        self.batch_size, self.batch_axis = batch_size, batch_axis
        self.rereading = Rereading(graph)
        self.memories = self.rereading.reading.memories
        self._read: ReadStructure | None = None
        self._layouts: dict[tuple[int, int], tuple[Numbers, str]] = {}  # by memory and numbers
        self._unread: list[LeftOut] = []  # further states that cannot be read
        self._has_shards = False  # whether each process that measures has a part of the tokens

    def along(self, axis: int, batch_size: int) -> StructureFinder:
        """The same, with the sequences along another axis."""
        other = copy(self)
        other.batch_axis, other.batch_size = axis, batch_size
        other.__dict__.pop("sequences", None)
        other._layouts = {}
        return other

    @cached_property
    def sequences(self) -> SequenceAxis:
        """Where the sequences of the batch are in each value."""
        return SequenceAxis(self.graph, self.batch_size, self.batch_axis)

    def structure(self, shards: TokenShards | None = None) -> Structure:
        """The structure.

        ``shards``: how the tokens of a sequence are spread over processes that measure together.
        Raises AxisError: Where the sequences should have been counted along the other axis.
        Raises ChainError, LayoutError, SiteError: Where the model cannot be read, or lacks a requested site.
        """
        self._has_shards = shards is not None
        found = self._found()
        chains = tuple(of.chain for of in found)
        read = [memory for of in found for memory in of.memories]
        is_plain = all(m.num_streams == 1 and not m.over_depth and not m.inner_streams for m in read)
        named = self.options.blocks is not None or self.options.layout is not None
        if read and is_plain and not named and (why := missing_state(self.graph, chains, read)):
            chains = tuple(
                replace(of, proof=f"unproven: {why}") if of.proof == PROVEN else of for of in chains
            )
        num_streams = self._num_streams(chains[0], found[0].memories)
        if not chains[0].has_streams:
            for chain in chains:
                _require_all_sequences(chain.shapes[0], chain.layout, self.batch_size, num_streams)
            chains = tuple(_with_asserted_streams(chain, num_streams) for chain in chains)
        if self.options.gradients:
            self._unread += filter(None, map(_without_gradients, chains))
        self.options.selection.require(chains)  # only now is it known which sites the model has
        if shards is not None:
            _require_plain_tokens(chains)
        # Where calls alone show the states, what the reading says of them.
        first = found[0].memories or self.memories
        return Structure(
            chains=chains,
            num_streams=num_streams,
            fractions=self._fractions(found[0]),
            batch_axis=self.batch_axis,
            selection=self.options.selection,
            inner_streams=first[0].inner_streams if first else 0,
            not_covered=self._not_covered(chains, read),
            shards=shards,
            read=self._read,
        )

    def _not_covered(self, chains: Sequence[Chain], read: Sequence[MemoryReading]) -> tuple[LeftOut, ...]:
        """What ran and lies in no chain; of a further state that cannot be read the reason for that."""
        others = {
            name: {self.graph.calls[unit].path for unit in self._units(memory)}
            for name, memory in self._choices.items()
            if memory.is_proven and memory not in read
        }
        is_named = self.options.blocks is not None
        self._unread += [] if is_named else self._further_states(read)
        parts = not_covered(self.graph, self.model, chains, read, others=others, named=is_named)
        unread = {part.module: part for part in self._unread}
        reasons = [unread.pop(part.module).why if part.module in unread else part.why for part in parts]
        return (*(replace(part, why=why) for part, why in zip(parts, reasons, strict=True)), *unread.values())

    @cached_property
    def _choices(self) -> dict[str, MemoryReading]:
        """The memories by the names with which `chain=` chooses them: of several with one name later ones have a number."""
        found: dict[str, MemoryReading] = {}
        for memory in self.memories:
            same = sum(other.name == memory.name for other in found.values())
            found[f"{memory.name}#{same + 1}" if same else memory.name] = memory
        return found

    def _further_states(self, read: Sequence[MemoryReading]) -> Iterator[LeftOut]:
        """What is said of proven memories that lie in the blocks of those that are read, and of no chain."""
        known = {part.module for part in self._unread}
        blocks = set[int]().union(*map(self._units, read))
        for name, memory in self._choices.items():
            units = self._units(memory)
            if memory in read or not memory.is_proven or memory.name in known or not units & blocks:
                continue
            why = f"a further state of these blocks; chain={name!r} reads it in their place"
            yield LeftOut(memory.name, 0, "", 0.0, why)

    # --- which memories

    def _found(self) -> list[ReadChain]:
        """The chains of the model, or those that the user names."""
        if self.options.blocks is not None:
            return self._named(self.options.blocks)
        if calls := self._linked():
            refused = f"unproven: {self.rereading.reading.refused}"
            try:
                return [self._of_calls(calls, self.memories[0].proof if self.memories else refused)]
            except LayoutError:
                # What the model is called with, such as an image, is no state.
                if self.memories or self.graph.sides[calls[0], "input"][0].kind != INPUT:
                    raise
        if not self.memories:
            pattern = likely_blocks(self.graph)
            raise ChainError(
                f"{self.rereading.reading.refused}; name the modules whose states are wanted with layers="
                f"{pattern or 'model.layers.{i}'!r}"
            )
        taken = self._chosen()
        first = taken[0][0]
        if first.num_streams > 1 or first.over_depth:
            return [self._weighed(first)]
        return self._with_names(self._plain_chains(taken))

    def _plain_chains(self, taken: Sequence[Sequence[MemoryReading]]) -> list[ReadChain]:
        """The chains of some plain memories, in order; further ones that cannot be read are named."""
        first = taken[0][0]
        found = self._plain(taken[0])
        if (why := self.rereading.reading.left_out.get(first.name)) is not None:
            self._unread.append(LeftOut(first.name, 0, "", 0.0, f"a further state of these blocks: {why}"))
        for stages in taken[1:]:
            try:
                further = self._plain(stages)
            except LayoutError as error:
                self._unread.append(self._left_out(stages, str(error)))
                continue
            if any(point.site == "post" for of in further for point in of.chain.points):
                found += further
            else:
                self._unread.append(self._left_out(stages, "its states lie between no blocks"))
        for of in found:
            _require_all_blocks(self.graph, self.model, of.chain)
        return sorted(found, key=lambda of: of.memories[0].root)

    def _linked(self) -> list[int]:
        """The calls of blocks, where they show more than the model's memory, which is not proven, or there is none."""
        first = next(iter(self.memories), None)
        if self.options.chain is not None or (first is not None and first.is_proven):
            return []
        joined = () if first is None else first.connections
        calls = linked_calls(self.graph)
        return calls if {branch.unit for of in joined for branch in of.branches} < set(calls) else []

    def _chosen(self) -> list[list[MemoryReading]]:
        """The memories that are taken, the model's first; stages of one trunk together."""
        wanted = self.options.chain
        if wanted is not None:
            if wanted not in self._choices:
                names = ", ".join(self._choices)
                raise ChainError(f"chain={wanted!r} names no residual memory of the model, which has {names}")
            return [[self._choices[wanted]]]
        first = self.memories[0]
        if first.num_streams > 1 or first.over_depth:
            return [[first]]
        plain = [m for m in self.memories if m.num_streams == 1 and not m.over_depth]
        trunks = self._with_stages(plain)
        least = FURTHER_SHARE * sum(memory.weights["branches"] for memory in trunks[0])
        kept = [of for of in trunks[1:] if all(m.is_proven for m in of)]
        blocks = set[int]().union(*map(self._units, trunks[0]))
        self._unread += [
            self._left_out(of, next(m.proof for m in of if not m.is_proven))
            for of in trunks[1:]
            if of not in kept and set() < set[int]().union(*map(self._units, of)) <= blocks
        ]
        return [
            trunks[0],
            *(
                of
                for of in kept
                # A further state of the same blocks is one of the model's, however small.
                if sum(m.weights["branches"] for m in of) >= least
                or set[int]().union(*map(self._units, of)) <= blocks
            ),
        ]

    def _left_out(self, stages: Sequence[MemoryReading], why: str) -> LeftOut:
        """What is said of a further state that cannot be read."""
        kinds = sorted(set().union(*map(self._kinds, stages)))
        blocks = len(set().union(*map(self._units, stages)))
        share = sum(memory.weights["branches"] for memory in stages)
        return LeftOut(stages[0].name, blocks, "/".join(kinds), share, f"a further state: {why}")

    def _with_stages(self, memories: Sequence[MemoryReading]) -> list[list[MemoryReading]]:
        """Memories of blocks of one class, of which each is computed from those before alone, as one trunk."""
        ordered = sorted(memories, key=lambda memory: memory.root)
        trunks: list[list[MemoryReading]] = []
        for memory in ordered:
            before = next((trunk for trunk in trunks if self._goes_on(trunk, memory)), None)
            if before is None:
                trunks.append([memory])
            else:
                before.append(memory)
        return sorted(trunks, key=lambda trunk: self.memories[0] not in trunk)

    def _goes_on(self, trunk: Sequence[MemoryReading], after: MemoryReading) -> bool:
        """Whether a memory is the next stage of a trunk: in its container, or of its class of blocks and another shape."""
        before, root = trunk[-1], self.graph.values[after.root]
        end = self._end(before)
        if root.number <= end.number or not self.graph.depends(root, end):
            return False
        alike = before.shape != after.shape and bool(self._kinds(before) & self._kinds(after))
        if not alike and before.name != after.name:
            return False
        known = set().union(*(memory.carried for memory in trunk))  # what else comes in is of another tower
        way = self.graph.earlier([root], known)
        return not any(
            way[v.number] and self.graph.depends_on_input(v) for v in self.graph.values if not v.parents
        )

    @staticmethod
    def _units(memory: MemoryReading) -> set[int]:
        """The calls of the blocks of a memory."""
        return {branch.unit for connection in memory.connections for branch in connection.branches} - {-1}

    def _kinds(self, memory: MemoryReading) -> set[str]:
        """The classes of the blocks of a memory."""
        return {self.graph.calls[unit].kind for unit in self._units(memory)}

    # --- what the user names

    def _named(self, layers: Sequence[str]) -> list[ReadChain]:
        calls = named_calls(self.graph, self.model, layers)
        found: list[ReadChain] = []
        for memory in self.memories:
            depths = states_around(self.graph, memory, calls)
            if depths is None:
                continue
            if memory.num_streams > 1 or memory.over_depth:
                return [self._weighed(memory)]
            found += [self._as_named(of, calls, depths) for of in self._plain([memory], depths)]
        if found:
            return self._with_names(found)
        why = self.rereading.reading.refused or "no residual memory has a branch in each of these modules"
        return [self._of_calls(calls, f"{ASSERTED}{why}")]

    def _of_calls(self, calls: Sequence[int], proof: str) -> ReadChain:
        """The chain of what some modules take and give, which are the states of no memory."""
        chain = chain_of_calls(self.graph, calls, proof)
        value = value_at(self.graph, chain.points[0])
        assert value is not None  # it was required of the calls
        layout = self.options.layout or shape_layout(value, self.sequences)
        return ReadChain(replace(chain, layout=layout), ())

    def _as_named(self, found: ReadChain, calls: Sequence[int], depths: Sequence[int]) -> ReadChain:
        """A chain with the user's blocks, and the states numbered by them where there is one before each."""
        blocks = [self.graph.calls[call] for call in calls]
        chain = replace(
            found.chain,
            blocks=tuple(dict.fromkeys(call.path for call in blocks)),
            block_class="/".join(dict.fromkeys(call.kind for call in blocks)),
        )
        if len(depths) == len(calls) + 1 == len(chain.points):
            labels = block_labels(blocks, constant=len(set(chain.shapes)) == 1)
            points = zip(chain.points, labels, strict=True)
            chain = replace(chain, points=tuple(replace(p, layer=n, site=site) for p, (n, site) in points))
        return replace(found, chain=chain)

    # --- chains and layouts

    def _plain(self, stages: Sequence[MemoryReading], depths: Sequence[int] | None = None) -> list[ReadChain]:
        """The chains of the stages of one trunk: one, or several where the order of the axes changes."""
        inside = self.options.selection.inside_blocks
        parts = [self._chain(memory, inside=inside, depths=depths) for memory in stages]
        found = []
        for _, group in groupby(parts, key=lambda part: part.chain.layout):
            chains = list(group)
            chain = with_opening(self.graph, chains[0], self.sequences) if depths is None else chains[0].chain
            for part in chains[1:]:
                layout_of = partial(self._layout_of, part.memories[0], "")
                chain = joined(chain, with_made_state(self.graph, part, layout_of))
            memories = tuple(memory for part in chains for memory in part.memories)
            chain = with_ending(self.graph, chain, self.sequences) if depths is None else chain
            joints = [connection for memory in memories for connection in memory.connections]
            branches = (branch for connection in joints for branch in connection.branches)
            chain = replace(
                self._with_final(chain, memories[-1]),
                scales=branch_scales(self.graph, branches),
                family="highway" if _gate_the_state(joints) else "",
            )
            found.append(ReadChain(chain, memories))
        return found

    def _with_final(self, chain: Chain, memory: MemoryReading) -> Chain:
        """The chain with the hook point after its last norm, where there is one."""
        shown, why = final_norm(self.graph, memory, chain.shapes[-1])
        if shown is None:
            return replace(chain, without_final=why)
        call = self.graph.calls[shown.call]
        layer = chain.points[-1].layer
        point = HookPoint(call.path, call.number, "output", layer, "final", call.path, item=shown.item)
        return replace(chain, final=point)

    def _chain(
        self, memory: MemoryReading, *, inside: bool = False, depths: Sequence[int] | None = None
    ) -> ReadChain:
        """The chain of one memory, with its layout."""
        root = self.graph.values[memory.root]
        named, mixed = self.options.layout or "", self.sequences.is_mixed(root, self._end(memory))
        if mixed and not named:
            self._refuse_mixed(root, memory)
        asserted = mixed or ("N" in named and memory.num_streams == 1)  # nothing in the model shows it
        if named and "N" not in named and memory.num_streams > 1:
            raise LayoutError(
                f"layout {named!r} names no streams, and the states of {memory.name} have {memory.num_streams}, proven by how "
                "they are mixed and written; leave layout= out"
            )
        counts = [
            sum(n.count for n in state.numbers) // max(math.prod(memory.shape), 1) for state in memory.states
        ]
        if repeats_first(self.graph, memory):
            counts = counts[1:]
        if len(set(counts)) > 1 and not memory.grows:
            raise LayoutError(
                f"the states of {memory.name} have {' or '.join(map(str, sorted(set(counts))))} streams; expected the same "
                "number at every depth. Name the modules whose states are wanted with layers="
            )

        layout_of = partial(self._layout_of, memory, named if asserted else "")
        for of in (layout_of, lambda *of: named):  # what the user says where the reading does not
            reader = ChainReader(self.graph, memory, of, has_shards=self._has_shards)
            part = reader.chain(inside=inside, wanted=depths)
            if part.chain.layout or not named:
                break
        if not part.chain.layout:
            raise LayoutError(
                f"the states of {memory.name}, of shape {part.chain.shapes[0]}, have their sequences, tokens and features in "
                "no order that a layout can name; say how they are read with layout="
            )
        return part

    def _layout_of(
        self, memory: MemoryReading, asserted: str, value: TracedValue, numbers: Numbers | None = None
    ) -> str:
        """The layout of a value, or the asserted one where it has as many axes; empty where it has none.

        ``numbers``: which elements of the memory it has, where it is none of its own values.
        """
        if asserted:
            return asserted if len(value.shape) == len(parse_layout(asserted)) else ""
        root = self.graph.values[memory.root]
        numbers = memory.carried.get(value.number) if numbers is None else numbers
        if numbers is None and value.shape == root.shape:  # before a norm with which the first block begins
            numbers = memory.carried[root.number]
        return "" if numbers is None else self._read_layout(memory, numbers)

    def _read_layout(self, memory: MemoryReading, numbers: Numbers) -> str:
        known = self._layouts.get((id(memory), id(numbers)))
        if known is None:
            known = numbers, read_layout(memory, numbers, self.sequences)
            self._layouts[id(memory), id(numbers)] = known
        return known[1]

    def _end(self, memory: MemoryReading) -> TracedValue:
        return self.graph.values[memory.states[-1].values[-1]]

    def _refuse_mixed(self, root: TracedValue, memory: MemoryReading) -> None:
        """Say along which axis the sequences are, where the branches mix what was taken for them."""
        end = self._end(memory)
        given = [value for value in self.graph.values if value.kind == "input" and len(value.shape) > 1]
        for value in given[:1] if self.batch_axis == 0 else ():
            other = SequenceAxis(self.graph, value.shape[1], 1)
            single = value.shape[1] == 1 and len(root.shape) > 2
            if single or (other.stride(root) is not None and not other.is_mixed(root, end)):
                raise AxisError(
                    "the model takes its tokens first, so the batch is its second axis; call the model once more"
                )
        rows = "where the rows are the nodes of a graph, say layout='B D'"
        packed = self._layout_of(memory, "", end).replace("B", "T")
        packed = packed if packed.split().count("T") == 1 else "T D"
        if len(root.shape) == 3 and root.shape[self.batch_axis] == self.batch_size:
            own = "T B D" if self.batch_axis else "B T D"
            rows = f"where the sequences meet in the branches alone, as in experts of a limited capacity, say layout={own!r}"
        raise LayoutError(
            f"the state of shape {root.shape} has its tokens along the axis that the model's first tensor has its sequences "
            "along: several sequences may be packed into one, and would be measured as one. Call the model with one sequence "
            f"in each row of the batch, padded where they differ in length; or say with layout={packed!r} that all "
            f"tokens are to be read as those of one sequence; {rows}"
        )

    def _weighed(self, memory: MemoryReading) -> ReadChain:
        """The chain of a memory that has streams or sums over depth."""
        part = self._chain(memory)
        chain = self._with_final(part.chain, memory)
        if not memory.is_proven or not chain.connections:
            return ReadChain(replace(chain, connections=()), (memory,))
        first = read_layout(memory, memory.states[0].numbers[0], self.sequences)
        read = ReadStructure(self.rereading, memory, first)
        try:
            found = read.weights(memory, self.batch_size)
        except (StreamConnectionError, LayoutError) as error:
            return ReadChain(self._without_weights(chain, error), (memory,))
        of_first = chain.connections[0]
        numbers = [n for n in range(len(chain.connections)) if n not in read.left_out]
        weights = read.without_other_views(dict(zip(numbers, found, strict=True)))
        outside = {
            chain.connections[number].depth_out
            for number in read.left_out
            if number or not read.is_first_shared
        }
        points = tuple(
            replace(p, site="pre") if n in outside and p.layer != chain.points[n - 1].layer else p
            for n, p in enumerate(chain.points)
        )  # what is added before the connections of a block
        chain = replace(
            chain, points=points, connections=tuple(chain.connections[number] for number in weights)
        )
        self._read = read
        if read.is_first_shared:
            why = (
                f"one tensor is each of the {memory.num_streams} streams before it, so that only sums over them are known of "
                "its weights, and of their gradients"
            )
            self._unread.append(LeftOut(of_first.path, 0, "", 0.0, why))
        read_before = [n for n, p in enumerate(points) if any(of.is_read_before for of in p.streams)]
        if read_before and self.options.gradients:
            why = (
                f"no gradients of the states {', '.join(map(str, read_before))}: a branch that is written into each had read "
                "a tensor of it before, so that autograd gives one sum of both gradients"
            )
            self._unread.append(LeftOut(of_first.path, 0, "", 0.0, why))
        if memory.over_depth:
            rows = [of for of, _ in weights.values() if isinstance(of, DepthWeights)]
            chain = replace(chain, family=depth_family(rows))
        elif not read.mixes and any(of.read is None for of, _ in weights.values() if isinstance(of, Parts)):
            chain = replace(chain, family="gated")
        elif any(branch.less_its_read for of in memory.connections for branch in of.branches):
            chain = replace(chain, family="altup")
        else:
            mixing = "mhc" if part.is_sinkhorn else "hc"
            chain = replace(chain, family=mixing if read.mixes else "independent_hc")
        return ReadChain(chain, (memory,))

    def _without_weights(self, chain: Chain, error: Exception) -> Chain:
        """The chain, where a run has no place for the weights of its connections; over depth it is proven with them."""
        made = [point.module for point in chain.points if point.site == "post"]
        # Of a block that normalises its state before it hands that on, which of both is read is in the weights.
        hands_on_another = any(path.startswith(f"{block}.") for path in made for block in chain.blocks)
        if not chain.history or hands_on_another:
            return replace(chain, connections=(), proof=f"unproven: {error}")
        self._unread.append(LeftOut("weights over depth", 0, "", 0.0, str(error)))
        return replace(chain, connections=(), family="depth_history")

    def _fractions(self, found: ReadChain) -> int:
        """Into how many parts the features of each stream are split."""
        states = (
            [state for memory in found.memories for state in memory.states] if found.chain.has_streams else []
        )
        layouts = [(n, self._read_layout(found.memories[0], n)) for state in states for n in state.numbers]
        fractions = {num_fractions(numbers, layout) for numbers, layout in layouts if "F" in layout}
        return fractions.pop() if len(fractions) == 1 else 1

    def _num_streams(self, chain: Chain, memories: Sequence[MemoryReading]) -> int:
        asserted = self.options.streams
        if not chain.has_streams:
            return count_streams(chain.shapes[0], chain.layout, self.batch_size, asserted)
        streams = memories[0].num_streams
        if asserted not in (None, streams):
            raise LayoutError(
                f"got streams={asserted}, but the connections of this model have {streams}; leave streams= out"
            )
        return streams

    def _with_names(self, found: Sequence[ReadChain]) -> list[ReadChain]:
        """Chains with distinct names: of their memories, shortened, or what blocks call the tracks that they take."""
        paths = [of.memories[0].name for of in found]
        short = dict(zip(unique := list(dict.fromkeys(paths)), _distinct(unique), strict=True))
        names = [
            short[path] if paths.count(path) == 1 else self._argument(of.chain)
            for path, of in zip(paths, found, strict=True)
        ]
        if len(set(names)) < len(names) or (len(names) > 1 and "" in names):
            names = _distinct(paths)
        return [
            replace(of, chain=replace(of.chain, name=name)) for of, name in zip(found, names, strict=True)
        ]

    def _argument(self, chain: Chain) -> str:
        """What the blocks of a chain call its state; empty where they take none."""
        point = next((point for point in chain.points if point.at == "input"), None)
        if point is None:
            return ""
        call = next(of for of in self.graph.calls if (of.path, of.number) == (point.path, point.index))
        of = call.arguments[point.item] if point.item < len(call.arguments) else len(call.arguments)
        names = list(inspect.signature(self.model.get_submodule(point.path).forward).parameters)
        return of if isinstance(of, str) else names[of] if of < len(names) else ""


def _distinct(paths: Sequence[str]) -> list[str]:
    """Short distinct names: the first component in which all paths differ."""
    if len(paths) == 1:
        return [""]
    parts = [path.split(".") for path in paths]
    for names in zip(*parts, strict=False):
        if len(set(names)) == len(paths):
            return list(names)
    return list(paths) if len(set(paths)) == len(paths) else [f"chain{i}" for i in range(len(paths))]


def _without_gradients(chain: Chain) -> LeftOut | None:
    """What is said of states of which autograd has a part of the gradient alone."""
    shown = ((depth, of) for depth, point in enumerate(chain.points) for of in (point.streams or (point,)))
    depths = dict.fromkeys(depth for depth, of in shown if of.is_read_inside and of.gradient_at is None)
    if not depths:
        return None
    why = (
        f"no gradients of the states {', '.join(map(str, depths))}: a function of autograd makes each and reads it itself, so "
        "that autograd has only a part of its gradient"
    )
    return LeftOut(chain.points[next(iter(depths))].module, 0, "", 0.0, why)


def _with_asserted_streams(chain: Chain, num_streams: int) -> Chain:
    """A chain without known connections; that a part of its state is a stream is not read from the model."""
    if num_streams == 1 or chain.history or chain.proof.startswith("unproven"):
        return chain
    asserted = f"unproven: {num_streams} streams are asserted by layout= and streams=; nothing in the model shows them"
    return replace(chain, proof=asserted)


def _require_all_sequences(shape: tuple[int, ...], layout: str, batch_size: int, num_streams: int) -> None:
    """Require that a layout finds as many sequences in a state as the model was called with."""
    state = torch.empty(shape, device="meta")
    found = canonical(state, layout, batch_size=batch_size, num_streams=num_streams).shape[0]
    if found != batch_size:
        raise LayoutError(
            f"layout {layout!r} finds {found} sequences in a state of shape {shape}, and the model was called with "
            f"{batch_size}; expected the axis of the model's sequences as B. Call the model with one sequence in each row of "
            "the batch"
        )


def _require_plain_tokens(chains: Sequence[Chain]) -> None:
    """Require a model of which parts of sequences can be measured: one stream, and one axis of tokens."""
    for chain in chains:
        if chain.has_streams or chain.over_depth or chain.history:
            raise CaptureError(
                "the tokens of each sequence are spread over processes, and the model mixes streams or depths; expected one "
                "stream that branches are added to. Record it without sequence parallelism"
            )
        if "T" not in chain.layout.split():
            raise CaptureError(
                f"the tokens of each sequence are spread over processes, and the states have the layout {chain.layout!r}; "
                "expected one axis of tokens. Record it without sequence parallelism"
            )


def _gate_the_state(connections: Iterable[ConnectionReading]) -> bool:
    """Whether a state is scaled otherwise at each token, and not only dropped at some, as by a mask."""
    known: set[tuple[Any, ...]] = set()
    for parts in (connection.parts for connection in connections):
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


def _require_all_blocks(graph: Graph, model: nn.Module, chain: Chain) -> None:
    """Refuse a forward that left out some of its blocks: their depths would be given to others."""
    modules = dict(module_paths(model))
    ran: set[str] = set()
    for call in graph.calls:
        parts = call.path.split(".")
        ran.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    lists = {
        (container, type(modules[path]))
        for path in chain.blocks
        if path in modules and (container := container_of(path)) is not None
    }
    for container, kind in lists:
        missing = [
            other
            for name, child in modules[container].named_children()
            if name.isdigit()
            and type(child) is kind
            and (other := f"{container}.{name}".lstrip(".")) not in ran
        ]
        if missing:
            raise ChainError(
                f"{', '.join(missing[:3])} did not run in this forward, and blocks like it did (layer drop leaves blocks out "
                "in training mode, for one); measure in evaluation mode, or name the blocks that run with layers="
            )
