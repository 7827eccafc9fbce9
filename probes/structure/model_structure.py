"""What was a model found to be? Its chains and layouts, and how the coefficients of a forward are read."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from depthscope.probes.connections.proof import DepthWeights, Parts, StreamConnectionError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.layout import LayoutError, canonical
from depthscope.probes.model.tensors import local_tensor
from depthscope.probes.reading.description import ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.read import Rereading
from depthscope.probes.structure.chain import Chain, Connection, HookPoint
from depthscope.probes.structure.not_covered import LeftOut
from depthscope.probes.structure.read_layout import token_order, tokens_of
from depthscope.probes.structure.sites import SiteSelection

FINAL = -1  # used as a depth: the state after the last norm


class ShownTensor(NamedTuple):
    """One tensor that a forward shows: a captured state, or one stream of it where each is a tensor of its own."""

    chain: int
    depth: int  # or `FINAL`
    stream: int
    point: HookPoint
    num_tensors: int  # that make up the state
    # Whether the tensor's gradient is another than that of this stream: it is every stream, was read before the state was, or
    # inside of the function of autograd that made it.
    is_shared: bool

    @property
    def key(self) -> tuple[int, int, int]:
        """Its chain, depth and stream."""
        return self.chain, self.depth, self.stream


@dataclass(frozen=True)
class Structure:
    """The residual chains of a model and how to read them; found once, in the first forward."""

    chains: tuple[Chain, ...]  # in the order in which they run
    num_streams: int  # residual streams n, counting each fraction of a stream; 1 for a plain residual model
    batch_axis: int  # of the sequences in the first tensor that the model is called with
    selection: SiteSelection  # which of the states and connections are captured
    fractions: int = 1  # into how many parts the features of each stream are split for the connections
    inner_streams: int = 0  # how many are expanded and merged inside each step of the first chain
    not_covered: tuple[LeftOut, ...] = ()  # what ran and lies in no chain, with the reasons
    read: ReadStructure | None = None  # how coefficients are read that only the operations of a forward show

    @cached_property
    def shown(self) -> tuple[ShownTensor, ...]:
        """What shows the captured states; a tensor that is every stream of a state comes once for each."""
        found = []
        for number, chain in enumerate(self.chains):
            wanted = self.selection.captured(chain)
            points = [(depth, of) for depth, of in enumerate(chain.points) if depth in wanted]
            if chain.final is not None and self.selection.includes("final"):
                points.append((FINAL, chain.final))
            for depth, point in points:
                of = point.streams or (point,)
                is_shared = len(set(of)) < len(of)
                is_shared |= any(p.without_gradient for p in (point, *of))
                found += [ShownTensor(number, depth, n, p, len(of), is_shared) for n, p in enumerate(of)]
        return tuple(found)

    @property
    def is_recorded(self) -> bool:
        """Whether only the operations of a forward show its states, or the weights of its connections."""
        return self.read is not None or any(of.point.at == "operation" for of in self.shown)

    @property
    def connections(self) -> tuple[Connection, ...]:
        """The stream connections of the first chain, which alone can have them."""
        return self.chains[0].connections if self.chains[0].has_streams else ()

    @property
    def family(self) -> str:
        """The connection family: residual, highway, hc, mhc, independent_hc, gated, depth_history, or unproven."""
        if self.connections:
            return self.chains[0].family
        if any(chain.history for chain in self.chains):
            return self.chains[0].family or "depth_history"
        if self.num_streams == 1 and not all(chain.proof == "proven" for chain in self.chains):
            return "unproven"
        return self.chains[0].family or "residual" if self.num_streams == 1 else "unknown"

    def canonical(
        self, number: int, state: torch.Tensor, batch_size: int, depth: int | None = None, own: str = ""
    ) -> torch.Tensor:
        """A state of a chain, or its gradient, as (B, T, N, D); a view where the layout allows it.

        ``own``: its layout, where that is not the one of the chain or of the depth.
        Returns: Of the state after the last norm (B, T, D): streams are collapsed by then, whatever their layout was.
        """
        if depth == FINAL and (self.connections or self.num_streams > 1):
            return state.reshape(batch_size, -1, state.shape[-1])
        own = own or ("" if depth is None or depth == FINAL else self.chains[number].points[depth].layout)
        layout = own or self.chains[number].layout
        found = canonical(
            local_tensor(state),
            layout,
            batch_size=batch_size,
            num_streams=self.num_streams,
            fractions=self.fractions if "F" in layout else 1,
        )
        return found.squeeze(2) if depth == FINAL else found


def require_same(found: Structure, before: Structure) -> None:
    """Require that a structure has the depths and connections of an earlier one, as one run must; CaptureError if not."""
    if _outline(found) != _outline(before):
        then, now = ([len(chain.points) for chain in of.chains] for of in (before, found))
        raise CaptureError(
            f"the model has other depths or states than in the first measured step ({then} then, {now} now): layers came, "
            "went or changed; a run has one set of depths, so close this recorder and open another one for the model as it "
            "is now"
        )


def _outline(structure: Structure) -> list[Any]:
    """What the axes of a run are made of."""
    chains = [
        (
            chain.name,
            [(point.layer, point.site) for point in chain.points],
            [(c.layer, c.branch, c.style, c.depth_in, c.depth_out) for c in chain.connections],
            [shape[-1] for shape in chain.shapes],
            chain.final is None,
            chain.history,
            chain.layout,
        )
        for chain in structure.chains
    ]
    return [*chains, structure.num_streams, structure.fractions, structure.family]


def require_all_sequences(shape: tuple[int, ...], layout: str, batch_size: int, num_streams: int) -> None:
    """Require that a layout finds as many sequences in a state as the model was called with."""
    state = torch.empty(shape, device="meta")
    found = canonical(state, layout, batch_size=batch_size, num_streams=num_streams).shape[0]
    if found != batch_size:
        raise LayoutError(
            f"layout {layout!r} finds {found} sequences in a state of shape {shape}, and the model was called with "
            f"{batch_size}; expected the axis of the model's sequences as B. Call the model with one sequence in each row of "
            "the batch"
        )


def chain_names(graph: Graph, model: nn.Module, chains: Sequence[Chain]) -> list[str]:
    """Distinct names: of their memories, shortened, or what blocks call the tracks that they take."""
    paths = [chain.memories[0].name for chain in chains]
    short = dict(zip(unique := list(dict.fromkeys(paths)), _distinct(unique), strict=True))
    names = [
        short[path] if paths.count(path) == 1 else _argument(graph, model, chain)
        for path, chain in zip(paths, chains, strict=True)
    ]
    is_clear = len(set(names)) == len(names) and (len(names) == 1 or "" not in names)
    return names if is_clear else _distinct(paths)


def _argument(graph: Graph, model: nn.Module, chain: Chain) -> str:
    """What the blocks of a chain call its state; empty where they take none."""
    point = next((point for point in chain.points if point.at == "input"), None)
    if point is None:
        return ""
    call = graph.calls[graph.call_of(point.path, point.index)]
    of = call.arguments[point.item] if point.item < len(call.arguments) else len(call.arguments)
    names = list(inspect.signature(model.get_submodule(point.path).forward).parameters)
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


def with_asserted_streams(chain: Chain, num_streams: int) -> Chain:
    """A chain without known connections; that a part of its state is a stream is not read from the model."""
    if num_streams == 1 or chain.history or chain.proof.startswith("unproven"):
        return chain
    asserted = f"unproven: {num_streams} streams are asserted by layout= and streams=; nothing in the model shows them"
    return replace(chain, proof=asserted)


class ReadStructure:
    """How the memory of a model with streams, or with sums over depth, is read in every forward as it was in the first."""

    def __init__(self, rereading: Rereading, memory: MemoryReading, first_layout: str):
        self.rereading, self._layout, self._num_streams = rereading, first_layout, memory.num_streams
        self.first: MemoryReading | None = memory
        # Of tokens, for a memory's numbers and a batch size.
        self._order: tuple[Any, int, torch.Tensor] | None = None
        self.casts = memory.casts
        self.mixes = any(connection.weighs for connection in self.first.connections)
        first = memory.connections[0]
        # Whether one tensor is every stream of the first state: of the first matrix only the sums of its rows are known.
        self.is_first_shared = not memory.over_depth and first.h_res.shape[2] < first.h_res.shape[1]
        # That, and those that read or write other numbers of streams at once than most: their step is one between connections.
        self.left_out = frozenset({0} if self.is_first_shared else ())

    def without_other_views(
        self, weights: Mapping[int, Parts | DepthWeights]
    ) -> dict[int, Parts | DepthWeights]:
        """The connections but for those whose branches read or write other numbers of streams at once than those of most."""
        views = {
            number: (of.branch_in.shape[-2], of.write.shape[-1])
            for number, of in weights.items()
            if isinstance(of, Parts)
        }
        usual = Counter(views.values()).most_common(1)[0][0] if views else None
        self.left_out |= {number for number, of in views.items() if of != usual}
        return {number: of for number, of in weights.items() if number not in self.left_out}

    def keep(self) -> None:
        """Let go of the first forward."""
        if self.first is not None:
            self.rereading.keep(self.first)
        self.first = None

    def weights(self, memory: MemoryReading, batch_size: int) -> list[Parts | DepthWeights]:
        """The coefficients of every connection; StreamConnectionError or LayoutError where they have no place in these."""
        numbers = memory.carried[memory.states[0].values[0]]
        if self._order is None or self._order[0] is not numbers or self._order[1] != batch_size:
            found = token_order(memory, numbers, self._layout, batch_size, self._num_streams)
            self._order = numbers, batch_size, found
        order = self._order[2]
        if memory.over_depth:
            return list(depth_weights(memory, order))
        return [stream_parts(connection, order, mixes=self.mixes) for connection in self.connections(memory)]

    def family(
        self, memory: MemoryReading, weights: Sequence[Parts | DepthWeights], *, is_sinkhorn: bool
    ) -> str:
        """What a model of these weights is called; ``is_sinkhorn``: whether Sinkhorn's iteration makes every matrix."""
        if memory.over_depth:
            return depth_family([of for of in weights if isinstance(of, DepthWeights)])
        if not self.mixes and any(of.read is None for of in weights if isinstance(of, Parts)):
            return "gated"
        return ("mhc" if is_sinkhorn else "hc") if self.mixes else "independent_hc"

    def connections(self, memory: MemoryReading) -> list[ConnectionReading]:
        """The connections with streams, of which `weights` are."""
        joined = (of for of in memory.connections if of.branches)
        return [connection for number, connection in enumerate(joined) if number not in self.left_out]

    def token_norms(
        self, memory: MemoryReading, tensors: Sequence[torch.Tensor], values: Sequence[TracedValue]
    ) -> torch.Tensor:
        """The norms (B, T) of what has the elements of some values of a memory, over streams and features."""
        assert self._order is not None
        squares = torch.zeros(math.prod(memory.token_shape) or 1, dtype=torch.float64)
        for tensor, value in zip(tensors, values, strict=True):
            flat, at = (
                tensor.detach().flatten().cpu().double(),
                tokens_of(memory, memory.carried[value.number]),
            )
            squares.index_add_(0, at[at >= 0], flat[at >= 0].square())
        return squares.sqrt()[self._order[2]]


def stream_parts(connection: ConnectionReading, order: torch.Tensor, *, mixes: bool) -> Parts:
    """The parts of a connection, by the reading's tokens in some order; StreamConnectionError where weights are no scalars."""
    if connection.h_res.shape[-1] > 1:
        raise StreamConnectionError(
            "H_res differs between the features of a stream: it is not a matrix over streams"
        )
    for names, where in ((connection.before_sum, "before"), (connection.after_sum, "after")):
        if names:
            raise StreamConnectionError(
                f"the streams go through {', '.join(names)} {where} the sum, which a connection has no part for"
            )
    branches, constant, taken = connection.branches, connection.constant, list[torch.Tensor]()
    for of in branches:
        path = of.branch.path or "a branch"
        if of.write.shape[-1] > 1:
            raise StreamConnectionError(f"H_post of {path} differs between the features of a stream")
        if of.taken is None:
            raise StreamConnectionError(f"what {path} takes has not the tokens of the state")
        taken.append(of.taken[order])
    # None where a branch reads by gates of each feature
    reads = [of.read[order] for of in branches if of.read is not None and of.read.shape[-1] == 1]
    return Parts(
        mix=connection.h_res[order][..., 0] if mixes else None,
        read=torch.cat(reads, -3)[..., 0] if len(reads) == len(branches) else None,
        write=torch.cat([of.write[order][..., 0] for of in branches], -1),
        branch_in=torch.cat(taken, -2),
        branch_out=torch.cat([of.out[order] for of in branches], -2),
        constant=None if constant is None else constant[order],
    )


def depth_weights(memory: MemoryReading, order: torch.Tensor) -> Iterator[DepthWeights]:
    """The weights over depth of every connection, of which the first source is the first state."""
    begin = memory.connections[0].state
    if begin is None or begin.shape[-1] > 1:
        raise StreamConnectionError("the weights over depth differ between the features of the first state")
    if bool(begin[:, 1:].any()) or bool((begin[:, 0] != 1).any()):
        raise StreamConnectionError("the first state is not the embedding alone")
    for connection in memory.connections:
        if not connection.branches:  # a mixture is read of what a block gave and of earlier outputs
            continue
        if len(connection.branches) != 1:
            raise StreamConnectionError(
                f"{len(connection.branches)} branches lie between two states of sums over depth; expected one"
            )
        (of,) = connection.branches
        path, carry, read = of.branch.path or "a branch", connection.h_res[:, 0], of.read
        if connection.constant is not None or of.write.shape[-1] > 1:
            raise StreamConnectionError(f"what {path} adds has no scalar weight")
        if read is None or max(read.shape[-1], carry.shape[-1]) > 1:
            raise StreamConnectionError(f"the weights over depth differ between the features at {path}")
        yield DepthWeights(
            read[order][..., 0].float(),
            carry[order][..., 0].float(),
            of.write[order].flatten(2).mean(-1).float(),
            of.out[order].squeeze(-2),
        )


def depth_family(weights: Sequence[DepthWeights]) -> str:
    """The family of a model with weights over depth: the same at every token where they are learned, others by attention."""
    rows = [torch.cat([of.read.flatten(2), of.carry, of.scale.unsqueeze(-1)], -1) for of in weights]
    if all(bool((row == row[:1, :1]).all()) for row in rows):
        ones = all(
            bool((of.read[..., : n + 1] == 1).all() and (of.carry[..., : n + 1] == 1).all())
            for n, of in enumerate(weights)
        )
        return "residual" if ones and all(bool((of.scale == 1).all()) for of in weights) else "depth_history"
    return "depth_attention"
