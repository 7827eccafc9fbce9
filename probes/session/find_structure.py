"""What is a model? Its chains, layouts and connections, from the reading of the graph of one recorded forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby

from torch import nn

from depthscope.probes.connections.proof import StreamConnectionError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.layout import LayoutError, count_streams, parse_layout
from depthscope.probes.reading.description import PROVEN, MemoryReading
from depthscope.probes.reading.graph import INPUT, Graph, TracedValue
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.read import Rereading
from depthscope.probes.session.options import Options
from depthscope.probes.structure.chain import (
    ASSERTED,
    Chain,
    ChainError,
    chain_of_calls,
    likely_blocks,
    linked_calls,
    named_calls,
    states_around,
    with_named_blocks,
    with_update,
)
from depthscope.probes.structure.model_structure import (
    ReadStructure,
    Structure,
    chain_names,
    require_all_sequences,
    with_asserted_streams,
)
from depthscope.probes.structure.not_covered import (
    FURTHER_SHARE,
    LeftOut,
    PartsLeftOut,
    missing_state,
    require_all_blocks,
    states_without_gradients,
)
from depthscope.probes.structure.read_chains import ChainReader
from depthscope.probes.structure.read_layout import (
    SequenceAxis,
    num_fractions,
    read_layout,
    repeats_first,
    shape_layout,
)
from depthscope.probes.structure.stages import (
    trunks_of,
    with_final,
    with_next_stage,
    with_opening,
)


class RewrittenError(CaptureError):
    """A state of the first forward was rewritten in place before it could be copied."""


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
        self.memories = self.rereading.memories
        self._read: ReadStructure | None = None
        self.sequences = SequenceAxis(graph, batch_size, batch_axis)
        self._unread: list[LeftOut] = []  # further states that cannot be read

    def structure(self) -> Structure:
        """The structure; AxisError where the sequences should have been counted along the other axis."""
        chains = tuple(self._chains_of_model())
        read = [memory for chain in chains for memory in chain.memories]
        is_plain = all(m.is_plain and not m.inner_streams for m in read)
        named = self.options.blocks is not None or self.options.layout is not None
        if read and is_plain and not named and (why := missing_state(self.graph, chains)):
            chains = tuple(
                replace(of, proof=f"unproven: {why}") if of.proof == PROVEN else of for of in chains
            )
        num_streams = self._num_streams(chains[0])
        if not chains[0].has_streams:
            for chain in chains:
                require_all_sequences(chain.shapes[0], chain.layout, self.batch_size, num_streams)
            chains = tuple(with_asserted_streams(chain, num_streams) for chain in chains)
        if self.options.gradients:
            self._unread += [part for chain in chains for part in states_without_gradients(chain)]
        self.options.selection.require(chains)  # only now is it known which sites the model has
        # Where calls alone show the states, what the reading says of them.
        first = chains[0].memories or self.memories
        return Structure(
            chains=tuple(replace(chain, memories=()) for chain in chains),
            num_streams=num_streams,
            fractions=self._fractions(chains[0]),
            batch_axis=self.batch_axis,
            selection=self.options.selection,
            inner_streams=first[0].inner_streams if first else 0,
            not_covered=self._not_covered(chains, read),
            read=self._read,
        )

    def _not_covered(self, chains: Sequence[Chain], read: Sequence[MemoryReading]) -> tuple[LeftOut, ...]:
        """What ran and lies in no chain; of a further state that cannot be read the reason for that."""
        is_named, blocks = self.options.blocks is not None, _units(read)
        others = {
            name: memory for name, memory in self._choices.items() if memory.is_proven and memory not in read
        }
        known = {part.module for part in self._unread}
        self._unread += [
            LeftOut(
                memory.name,
                why=f"also proven: a further residual stream of these blocks; chain={name!r} reads it in their place",
            )
            for name, memory in others.items()
            if not is_named and memory.name not in known and memory.units & blocks
        ]
        if read and (path := read[-1].mixed_for_head):
            why = f"the head reads a weighted sum of the last state and of earlier ones, made in {path}, which is not measured"
            self._unread.append(LeftOut("weights over depth", 0, "", 0.0, why))
        paths = {name: {self.graph.calls[n].path for n in memory.units} for name, memory in others.items()}
        parts = PartsLeftOut(self.graph, self.model, chains, paths, named=is_named).found()
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

    # --- which memories

    def _chains_of_model(self) -> list[Chain]:
        """The chains of the model, or those that the user names."""
        if self.options.blocks is not None:
            return self._chains_of_named_blocks(self.options.blocks)
        if calls := self._linked_blocks():
            refused = f"unproven: {self.rereading.refused}"
            try:
                return [self._chain_of_calls(calls, self.memories[0].proof if self.memories else refused)]
            except LayoutError:
                # What the model is called with, such as an image, is no state.
                if self.memories or self.graph.sides[calls[0], "input"][0].kind != INPUT:
                    raise
        if not self.memories:
            raise ChainError(f"{self.rereading.refused}{self._or_layers.replace(', or', ';')}")
        taken = self._chosen_memories()
        first = taken[0][0]
        if not first.is_plain:
            return [self._chain_with_connections(first)]
        return self._with_names(self._plain_chains(taken))

    @property
    def _or_layers(self) -> str:
        """The advice to name blocks, with a pattern that was tried on this model, for a user who did not."""
        if self.options.blocks is not None:
            return ""
        pattern = likely_blocks(self.graph, self.model)
        return f", or name the modules whose states are wanted with layers={repr(pattern) if pattern else ''}"

    def _plain_chains(self, taken: Sequence[Sequence[MemoryReading]]) -> list[Chain]:
        """The chains of some plain memories, in order; further ones that cannot be read are named."""
        first = taken[0][0]
        found = self._chains_of_stages(taken[0])
        if (why := self.rereading.left_out.get(first.name)) is not None:
            self._unread.append(
                LeftOut(first.name, why=f"a further residual stream of these blocks is not measured: {why}")
            )
        for stages in taken[1:]:
            try:
                further, why = self._chains_of_stages(stages), "its states lie between no blocks"
            except LayoutError as error:
                further, why = [], str(error)
            if any(point.site == "post" for chain in further for point in chain.points):
                found += further
            else:
                self._unread.append(self._further_state_left_out(stages, why))
        for chain in found:
            require_all_blocks(self.graph, chain)
        return sorted(found, key=lambda of: of.memories[0].root)

    def _linked_blocks(self) -> list[int]:
        """The calls of blocks, where they show more than the model's memory, which is not proven, or there is none."""
        first = next(iter(self.memories), None)
        if self.options.chain is not None or (first is not None and first.is_proven):
            return []
        calls, known = linked_calls(self.graph), [] if first is None else first.branches
        return calls if {branch.unit for branch in known} < set(calls) else []

    def _chosen_memories(self) -> list[list[MemoryReading]]:
        """The memories that are taken, the model's first; stages of one trunk together."""
        wanted = self.options.chain
        if wanted is not None:
            if wanted not in self._choices:
                names = ", ".join(self._choices)
                raise ChainError(f"chain={wanted!r} names no residual memory of the model, which has {names}")
            return [[self._choices[wanted]]]
        fitting = [memory for memory in self.memories if self._has_axes(memory)]
        if not fitting:
            shapes = {name: self.graph.values[memory.end].shape for name, memory in self._choices.items()}
            raise LayoutError(
                f"layout={self.options.layout!r} has the axes of no residual stream that was found; found are states of the "
                f"shapes {', '.join(f'{shape} in {name}' for name, shape in shapes.items())}. Leave layout= out, or name axes "
                "of these"
            )
        layout, streams = self.options.layout or "", self.options.streams
        # Where layout= names streams, nothing in the model has to show them.
        asserted = "N" in layout or streams is None
        first = next((of for of in fitting if asserted or of.num_streams == streams), fitting[0])
        if not first.is_plain or first is not self.memories[0]:
            return [[first]]
        trunks = trunks_of(self.graph, [memory for memory in self.memories if memory.is_plain])
        least, blocks = FURTHER_SHARE * sum(memory.share for memory in trunks[0]), _units(trunks[0])
        taken = [trunks[0]]
        for stages in trunks[1:]:
            units, unproven = _units(stages), [memory.proof for memory in stages if not memory.is_proven]
            # A further state of the same blocks is one of the model's, however small.
            if not unproven and (units <= blocks or sum(memory.share for memory in stages) >= least):
                taken.append(stages)
            elif unproven and set() < units <= blocks:
                self._unread.append(self._further_state_left_out(stages, unproven[0]))
        return taken

    def _has_axes(self, memory: MemoryReading) -> bool:
        """Whether the states of a memory have as many axes as layout= names, where it does."""
        layout, values = self.options.layout, memory.states[-1].values
        axes = len(self.graph.values[values[-1]].shape)
        return layout is None or len(parse_layout(layout)) - axes in (0, len(values) > 1)

    def _further_state_left_out(self, stages: Sequence[MemoryReading], why: str) -> LeftOut:
        """What is said of a further state that cannot be read."""
        units = _units(stages)
        kinds, blocks = sorted({self.graph.calls[unit].kind for unit in units}), len(units)
        share = sum(memory.share for memory in stages)
        why = f"a further residual stream that is not measured: {why.removeprefix('unproven: ')}"
        return LeftOut(stages[0].name, blocks, "/".join(kinds), share, why)

    # --- what the user names

    def _chains_of_named_blocks(self, layers: Sequence[str]) -> list[Chain]:
        calls = named_calls(self.graph, self.model, layers)
        found: list[Chain] = []
        for memory in self.memories:
            depths = states_around(self.graph, memory, calls)
            if depths is None or not (memory.is_plain or memory.is_proven):
                continue
            if not memory.is_plain:
                return [self._chain_with_connections(memory)]
            for chain in self._chains_of_stages([memory], depths):
                found.append(with_named_blocks(self.graph, chain, calls, depths))
        if found:
            return self._with_names(found)
        why = self.rereading.refused or "no residual memory has a branch in each of these modules"
        return [self._chain_of_calls(calls, f"{ASSERTED}{why}")]

    def _chain_of_calls(self, calls: Sequence[int], proof: str) -> Chain:
        """The chain of what some modules take and give, which are the states of no memory."""
        chain = chain_of_calls(self.graph, calls, proof)
        value = self.graph.values[chain.points[0].number]
        try:
            layout = self.options.layout or shape_layout(value, self.sequences)
        except LayoutError as error:
            raise LayoutError(f"{error}{self._or_layers}") from None
        return replace(chain, layout=layout)

    # --- chains and layouts

    def _chains_of_stages(
        self, stages: Sequence[MemoryReading], depths: Sequence[int] | None = None
    ) -> list[Chain]:
        """The chains of the stages of one trunk: one, or several where the order of the axes changes."""
        inside = self.options.selection.inside_blocks
        parts = [self._chain(memory, inside=inside, depths=depths) for memory in stages]
        found = []
        for _, group in groupby(parts, key=lambda part: part.layout):
            chains = list(group)
            chain = with_opening(self.graph, chains[0], self.sequences) if depths is None else chains[0]
            for part in chains[1:]:
                chain = with_next_stage(chain, part)
            found.append(with_update(with_final(self.graph, chain)))
        return found

    def _chain(
        self, memory: MemoryReading, *, inside: bool = False, depths: Sequence[int] | None = None
    ) -> Chain:
        """The chain of one memory, with its layout."""
        root = self.graph.values[memory.root]
        named, mixed = self.options.layout or "", self.sequences.is_mixed(root, self.graph.values[memory.end])
        if mixed and not named:
            self._refuse_mixed(root, memory)
        asserted = mixed or ("N" in named and memory.num_streams == 1)  # nothing in the model shows it
        if named and "N" not in named and memory.num_streams > 1:
            raise LayoutError(
                f"layout {named!r} names no streams, and the states of {memory.name} have {memory.num_streams}, proven by how "
                "they are mixed and written; leave layout= out"
            )
        sizes = [sum(memory.carried[n].count for n in state.values) for state in memory.states]
        counts = [size // max(math.prod(memory.shape), 1) for size in sizes]
        if repeats_first(self.graph, memory):
            counts = counts[1:]
        if len(set(counts)) > 1:
            raise LayoutError(
                f"the states of {memory.name} have {' or '.join(map(str, sorted(set(counts))))} streams; expected the same "
                "number at every depth. Name the modules whose states are wanted with layers="
            )

        layout_of = partial(self._layout_of, memory, named if asserted else "")
        for of in (layout_of, lambda *of: named):  # what the user says where the reading does not
            chain = ChainReader(self.graph, memory, of).chain(inside=inside, wanted=depths)
            if chain.layout or not named:
                break
        if not chain.layout:
            raise LayoutError(
                f"the states of {memory.name}, of shape {chain.shapes[0]}, have their sequences, tokens and features in "
                f"no order that a layout can name; say how they are read with layout={self._or_layers}"
            )
        return chain

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
        return "" if numbers is None else read_layout(memory, numbers, self.sequences)

    def _refuse_mixed(self, root: TracedValue, memory: MemoryReading) -> None:
        """Say along which axis the sequences are, where the branches mix what was taken for them."""
        end = self.graph.values[memory.end]
        given = [value for value in self.graph.values if value.kind == "input" and len(value.shape) > 1]
        for value in given[:1] if self.batch_axis == 0 else ():
            other = SequenceAxis(self.graph, value.shape[1], 1)
            single = value.shape[1] == 1 and len(root.shape) > 2
            if single or (other.stride(root) is not None and not other.is_mixed(root, end)):
                raise AxisError(
                    "the model takes its tokens first, so the batch is its second axis; call the model once more"
                )
        packed = self._layout_of(memory, "", end).replace("B", "T")
        raise self.sequences.mixed_error(root, packed if packed.split().count("T") == 1 else "T D")

    def _chain_with_connections(self, memory: MemoryReading) -> Chain:
        """The chain of a memory that has streams or sums over depth."""
        chain = with_final(self.graph, self._chain(memory))
        if not memory.is_proven or not chain.connections:
            return replace(chain, connections=())
        first = read_layout(memory, memory.carried[memory.states[0].values[0]], self.sequences)
        read = ReadStructure(self.rereading, memory, first)
        try:
            found = read.weights(memory, self.batch_size)
        except (StreamConnectionError, LayoutError) as error:
            return self._without_weights(chain, error)
        is_sinkhorn = all(connection.is_sinkhorn for connection in chain.connections)
        numbers = [n for n in range(len(chain.connections)) if n not in read.left_out]
        weights = read.without_other_views(dict(zip(numbers, found, strict=True)))
        outside = {
            chain.connections[number].depth_out
            for number in read.left_out
            if number or not read.is_first_shared
        }
        # What is added before the connections of a block.
        points = tuple(
            replace(p, site="pre") if n in outside and p.layer != chain.points[n - 1].layer else p
            for n, p in enumerate(chain.points)
        )
        self._read = read
        if read.is_first_shared:
            why = (
                f"one tensor is each of the {memory.num_streams} streams before it, so that only sums over them are known of "
                "its weights, and of their gradients"
            )
            self._unread.append(LeftOut(chain.connections[0].path, why=why))
        family = read.family(memory, list(weights.values()), is_sinkhorn=is_sinkhorn)
        joined = tuple(chain.connections[number] for number in weights)
        return replace(chain, points=points, connections=joined, family=family)

    def _without_weights(self, chain: Chain, error: Exception) -> Chain:
        """The chain, where a run has no place for the weights of its connections; over depth it is proven with them."""
        made = [point.module for point in chain.points if point.site == "post"]
        # Of a block that normalises its state before it hands that on, which of both is read is in the weights.
        hands_on_another = any(path.startswith(f"{block}.") for path in made for block in chain.blocks)
        if not chain.history or hands_on_another:
            return replace(chain, connections=(), proof=f"unproven: {error}")
        self._unread.append(LeftOut("weights over depth", why=str(error)))
        return replace(chain, connections=(), family="depth_history")

    def _fractions(self, chain: Chain) -> int:
        """Into how many parts the features of each stream are split."""
        memories = chain.memories if chain.has_streams else ()
        numbers = [(m, m.carried[n]) for m in memories for state in m.states for n in state.values]
        layouts = [(of, read_layout(memory, of, self.sequences)) for memory, of in numbers]
        fractions = {num_fractions(of, layout) for of, layout in layouts if "F" in layout}
        return fractions.pop() if len(fractions) == 1 else 1

    def _num_streams(self, chain: Chain) -> int:
        asserted = self.options.streams
        if not chain.has_streams:
            return count_streams(chain.shapes[0], chain.layout, self.batch_size, asserted)
        streams = chain.memories[0].num_streams
        if asserted not in (None, streams):
            raise LayoutError(
                f"got streams={asserted}, but the connections of this model have {streams}; leave streams= out"
            )
        return streams

    def _with_names(self, found: Sequence[Chain]) -> list[Chain]:
        """The chains with distinct names."""
        names = chain_names(self.graph, self.model, found)
        return [replace(chain, name=name) for chain, name in zip(found, names, strict=True)]


def _units(stages: Iterable[MemoryReading]) -> set[int]:
    """The calls of the blocks of some memories."""
    return set[int]().union(*(memory.units for memory in stages))
