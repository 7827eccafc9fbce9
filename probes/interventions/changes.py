"""What does each kind of experiment change? A plan names places; each place becomes one experiment on a model under test.

States X_k are (B, T, N, D). A connection from depth k to k + 1 satisfies X_{k+1} = H_res X_k + H_post ⊗ F; with another
matrix the next state is X_{k+1} + (H_new − H_res) X_k, and the branch's write is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from depthscope.diagnostics.experiments import ExperimentKind, kind_named
from depthscope.probes.interventions.model_under_test import Edit, ModelUnderTest
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.structure.chain import Connection

Numbers: TypeAlias = int | Iterable[int] | None
Edits: TypeAlias = Mapping[int, Edit]


@dataclass(frozen=True)
class Plan:
    """What is to be tried, and where; without places every place of the model is tried, one at a time.

    Parameters
    ----------
    kind : str
        Name of an `ExperimentKind`.
    blocks, connections, depths, streams : tuple of int, optional
        Where.
    """

    kind: str
    blocks: tuple[int, ...] | None = None
    connections: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    streams: tuple[int, ...] | None = None


def plan(
    kind: str,
    *,
    blocks: Numbers = None,
    connections: Numbers = None,
    depths: Numbers = None,
    streams: Numbers = None,
) -> Plan:
    """What is to be tried, and where.

    Parameters
    ----------
    kind : str
        ``"skip"`` (a block); ``"identity"``, ``"uniform"`` (in place of H_res); ``"drop_stream"``, ``"bypass"`` (of the
        state at a depth).
    blocks, connections, depths, streams : int or iterable of int, optional
        Where; every place by default. A depth means the block or connection that ends there.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        For an unknown kind.
    """
    return Plan(kind_named(kind).name, *map(_numbers, (blocks, connections, depths, streams)))


def _numbers(given: Numbers) -> tuple[int, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, int) else tuple(int(number) for number in given)


@dataclass(frozen=True)
class Change:
    """One experiment: a name for people, where it is, and the edits of its forward.

    ``name``: such as ``"skip block 3"``.
    ``kind``: its kind.
    ``edits``: ``edits(model)`` returns the edits by depth; it may run the model to learn them.
    ``block, depth, connection, stream``: where; −1 where it is none alone.
    """

    name: str
    kind: str
    edits: Callable[[ModelUnderTest], Edits]
    block: int = -1
    depth: int = -1
    connection: int = -1
    stream: int = -1


def selected(depth: int, connections: Iterable[int], block: int, wanted: Plan) -> bool:
    """Whether a place is among those that a plan asks for."""
    given = [
        (wanted.depths, {depth}),
        (wanted.connections, set(connections)),
        (wanted.blocks, {block}),
    ]
    asked = [set(numbers) & here for numbers, here in given if numbers is not None]
    return not asked or all(asked)


# --- what edits have in common


def bypassing(kind: str, start: int, stop: int, model: ModelUnderTest) -> Callable[[ModelUnderTest], Edits]:
    """The edits that put the state at one depth in the place of that at a later one.

    Raises InterventionError: For a model whose blocks read more than the state before them.
    """
    if model.chain.over_depth or model.chain.history:
        raise InterventionError(
            f"{kind}: blocks of this model read sums over all earlier depths ({model.structure.family}), so that the "
            "state before a block is not what the later ones would read without it; patch or drop states at a depth instead"
        )
    return lambda model: {stop: lambda state, seen: fitting(seen[start], state, start, stop).clone()}


def fitting(value: torch.Tensor, state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The value, where it has the shape of the state whose place it takes."""
    if value.shape != state.shape:
        raise InterventionError(
            f"the block from depth {start} to {stop} turns a state of shape {tuple(value.shape)} into one of "
            f"{tuple(state.shape)} (sequence, token, stream, feature); a block that changes the shape cannot be skipped"
        )
    return value


def changes(wanted: Plan, model: ModelUnderTest) -> list[Change]:
    """The experiments of a plan on one model.

    ``model``: its structure decides which places there are.
    """
    kind = kind_named(wanted.kind)
    if kind.streams and (model.num_streams < 2 or model.number):
        raise InterventionError(
            f"{kind.name} needs several residual streams with connections; this chain has {model.num_streams}"
            + (" and is not the first one" if model.number else "")
        )
    made = {"block": _of_blocks, "connection": _of_connections, "depth": _of_depths}[kind.unit](
        kind, wanted, model
    )
    found = list(made)
    if not found:
        raise InterventionError(
            f"{kind.name}: none of the {kind.unit}s that were asked for exists; {_places(kind, model)}"
        )
    return found


def _places(kind: ExperimentKind, model: ModelUnderTest) -> str:
    last = len(model.chain.points) - 1
    return (
        f"the model has blocks {min(model.layers)} … {max(model.layers)}, depths 0 (embedding) … {last}, "
        f"{len(model.chain.connections)} connections and {model.num_streams} stream{'s' * (model.num_streams != 1)}"
    )


# --- blocks


def _of_blocks(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    for block, (start, stop) in model.layers.items():
        # A depth inside of a block means the block too.
        depths = [depth for depth in (wanted.depths or ()) if start < depth <= stop]
        at = replace(wanted, depths=None) if depths else wanted
        inside = [n for n, link in enumerate(model.chain.connections) if start <= link.depth_in < stop]
        if selected(stop, inside, block, at):
            edits = bypassing(kind.name, start, stop, model)
            yield Change(f"skip block {block}", "skip", edits, block=block, depth=stop)


# --- connections


def _of_connections(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    mixing = model.base.mixing
    if not mixing:
        raise InterventionError(
            f"{kind.name}: no connection of this model ({model.structure.family}) has a mixing matrix H_res to replace; "
            "each stream keeps its own state"
        )
    for number in mixing:
        link = model.chain.connections[number]
        if selected(link.depth_out, [number], link.layer, wanted):
            yield _remixed(kind.name, number, model)


def _remixed(rule: str, number: int, model: ModelUnderTest) -> Change:
    link = model.chain.connections[number]

    def edits(model: ModelUnderTest) -> Edits:
        known = model.base.mixing[number]
        return remixed(MATRICES[rule](known) - known, link)

    name = f"H_res of connection {number} ({link.branch}, block {link.layer}): {rule}"
    return Change(name, rule, edits, block=link.layer, depth=link.depth_out, connection=number)


def remixed(difference: torch.Tensor, link: Connection) -> Edits:
    """The edit that adds a difference to the matrix of a connection, whose branch writes what it wrote."""

    def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
        before = seen[link.depth_in]
        # In float64: the difference may be small against the state.
        moved = difference.to(before.device) @ before.double()
        return (state.double() + moved).to(state.dtype)

    return {link.depth_out: edit}


# --- states


def _of_depths(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    """The experiments of a plan on states."""
    depths = [depth for depth in range(len(model.chain.points)) if _depth_selected(depth, wanted, model)]
    if kind.name == "drop_stream":
        return (_dropped(depth, stream, model) for depth in depths for stream in _streams(wanted, model))
    return _bypassed([depth for depth in depths if depth], wanted, model)


def _bypassed(depths: list[int], wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    """The steps to the named depths at once, or one at a time where none is named."""
    spans = [(depths[0], depths[-1])] if wanted.depths and depths else [(depth, depth) for depth in depths]
    for first, last in spans:
        steps = f"steps to depths {first} … {last}" if last > first else f"step to depth {last}"
        yield Change(
            f"without the {steps}", "bypass", bypassing("bypass", first - 1, last, model), depth=last
        )


def _depth_selected(depth: int, wanted: Plan, model: ModelUnderTest) -> bool:
    point = model.chain.points[depth]
    ends = [number for number, link in enumerate(model.chain.connections) if link.depth_out == depth]
    return selected(depth, ends, point.layer, wanted)


def _streams(wanted: Plan, model: ModelUnderTest) -> Iterator[int]:
    for stream in range(model.num_streams) if wanted.streams is None else wanted.streams:
        if not 0 <= stream < model.num_streams:
            raise InterventionError(f"no stream {stream}; the model has streams 0 … {model.num_streams - 1}")
        yield stream


def _dropped(depth: int, stream: int, model: ModelUnderTest) -> Change:
    def edits(model: ModelUnderTest) -> Edits:
        def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
            changed = state.clone()
            changed[:, :, stream] = 0
            return changed

        return {depth: edit}

    return Change(
        f"drop stream {stream} at depth {depth}",
        "drop_stream",
        edits,
        block=model.chain.points[depth].layer,
        depth=depth,
        stream=stream,
    )


MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda mix: torch.eye(mix.shape[-1], dtype=mix.dtype).expand_as(mix),
    "uniform": lambda mix: torch.full_like(mix, 1 / mix.shape[-1]),
}
"""What takes the place of H_res (B, T, N, N), by the kind of the experiment."""
