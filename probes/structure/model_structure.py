"""What a model was found to be in its first forward: its chains, layouts and stream connections."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.layout import LayoutError, canonical
from depthscope.probes.model.tensors import local_tensor
from depthscope.probes.reading.graph import Graph
from depthscope.probes.structure.chain import Chain, Connection, HookPoint
from depthscope.probes.structure.not_covered import LeftOut
from depthscope.probes.structure.read_parts import ReadStructure
from depthscope.probes.structure.sites import SiteSelection

FINAL = -1  # used as a depth: the state after the last norm


class CapturedState(NamedTuple):
    """One state that is captured in every forward: the number of its chain, its depth, and what shows it."""

    chain: int
    depth: int  # or `FINAL`
    point: HookPoint


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
    """The residual chains of a model and how to read them; found once, in the first forward.

    Parameters
    ----------
    chains : tuple of Chain
        In the order in which they run.
    num_streams : int
        Number of residual streams n, counting each fraction of a stream; 1 for a plain residual model.
    batch_axis : int
        Axis of the sequences in the first tensor that the model is called with.
    selection : SiteSelection
        Which of the states and connections are captured.
    fractions : int
        Into how many parts the features of each stream are split for the connections; mostly 1.
    inner_streams : int
        How many streams are expanded and merged inside each step of the first chain; 0 for none.
    not_covered : tuple of LeftOut
        What ran and lies in no chain, with the reasons.
    read : ReadStructure or None
        How the coefficients of its connections are read, where the operations of each forward show them.
    """

    chains: tuple[Chain, ...]
    num_streams: int
    batch_axis: int
    selection: SiteSelection
    fractions: int = 1
    inner_streams: int = 0
    not_covered: tuple[LeftOut, ...] = ()
    read: ReadStructure | None = None

    @cached_property
    def captured(self) -> tuple[CapturedState, ...]:
        """Every state that is captured."""
        found: list[CapturedState] = []
        for number, chain in enumerate(self.chains):
            wanted = self.selection.captured(chain)
            found += [
                CapturedState(number, depth, p) for depth, p in enumerate(chain.points) if depth in wanted
            ]
            if chain.final is not None and self.selection.includes("final"):
                found.append(CapturedState(number, FINAL, chain.final))
        return tuple(found)

    @cached_property
    def shown(self) -> tuple[ShownTensor, ...]:
        """What shows the captured states; a tensor that is every stream of a state comes once for each."""
        found = []
        for chain, depth, point in self.captured:
            of = point.streams or (point,)
            is_shared = len(set(of)) < len(of)
            is_shared |= any(p.is_read_before or p.is_read_inside for p in (point, *of))
            found += [ShownTensor(chain, depth, n, p, len(of), is_shared) for n, p in enumerate(of)]
        return tuple(found)

    @property
    def is_recorded(self) -> bool:
        """Whether only the operations of a forward show its states, or the weights of its connections."""
        points = (of.point for of in self.shown)
        return self.read is not None or any(p.at == "operation" or p.gradient_at is not None for p in points)

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
    """Require that a structure has the depths and connections of an earlier one, so that one run can have both.

    ``found, before``: modules may have been wrapped or replaced in between.
    Raises CaptureError: Where a depth or a connection of one is not in the other.
    """
    for name, now, then in (
        ("depths", [len(chain.points) for chain in found.chains], [len(c.points) for c in before.chains]),
        ("states", _outline(found), _outline(before)),
    ):
        if now != then:
            detail = f" ({then} then, {now} now)" if name == "depths" else ""
            raise CaptureError(
                f"the model has other {name} than in the first measured step{detail}: layers came, went or changed; a run "
                "has one set of depths, so close this recorder and open another one for the model as it is now"
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


def chain_names(graph: Graph, model: nn.Module, chains: Sequence[tuple[str, Chain]]) -> list[str]:
    """Distinct names: of their memories (which are given), shortened, or what blocks call the tracks that they take."""
    paths = [path for path, _ in chains]
    short = dict(zip(unique := list(dict.fromkeys(paths)), _distinct(unique), strict=True))
    names = [
        short[path] if paths.count(path) == 1 else _argument(graph, model, chain) for path, chain in chains
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
