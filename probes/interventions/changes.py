"""What does each kind of experiment change? A plan names places; each place becomes one experiment on a model under test.

States X_k are (B, T, N, D). A connection from depth k to k + 1 satisfies X_{k+1} = H_res X_k + H_post ⊗ F; with another
matrix the next state is X_{k+1} + (H_new − H_res) X_k, and the branch's write is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch

from depthscope.diagnostics.experiments import kind_named
from depthscope.probes.interventions.model_under_test import Edit, ModelUnderTest, Seen
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
    return Plan(kind_named(kind).name, *map(numbers_of, (blocks, connections, depths, streams)))


def numbers_of(given: Numbers) -> tuple[int, ...] | None:
    """Numbers of places, as a tuple; None for all of them."""
    if given is None:
        return None
    return (given,) if isinstance(given, int) else tuple(int(number) for number in given)


@dataclass(frozen=True)
class Change:
    """One experiment: a name for people, where it is, and the edits of its forward.

    ``name``: such as ``"skip block 3"``.
    ``kind``: its kind.
    ``edits``: by depth.
    ``block, depth, connection, stream``: where; −1 where it is none alone.
    """

    name: str
    kind: str
    edits: Edits
    block: int = -1
    depth: int = -1
    connection: int = -1
    stream: int = -1


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
    made = {
        "skip": _skipped,
        "identity": _remixed,
        "uniform": _remixed,
        "drop_stream": _dropped,
        "bypass": _bypassed,
    }
    found = list(made[kind.name](kind.name, wanted, model))
    if not found:
        raise InterventionError(
            f"{kind.name}: none of the {kind.unit}s that were asked for exists; the model has blocks {min(model.layers)} … "
            f"{max(model.layers)}, depths 0 (embedding) … {len(model.chain.points) - 1}, {len(model.chain.connections)} "
            f"connections and {model.num_streams} stream{'s' * (model.num_streams != 1)}"
        )
    return found


def _is_selected(wanted: Plan, depth: int, connections: Iterable[int], block: int) -> bool:
    """Whether a place is among those that a plan asks for."""
    given = ((wanted.depths, {depth}), (wanted.connections, {*connections}), (wanted.blocks, {block}))
    return all(here & {*numbers} for numbers, here in given if numbers is not None)


def _depths(wanted: Plan, model: ModelUnderTest) -> list[int]:
    """The depths that a plan asks for."""
    links = list(enumerate(model.chain.connections))
    return [
        depth
        for depth, point in enumerate(model.chain.points)
        if _is_selected(wanted, depth, [n for n, link in links if link.depth_out == depth], point.layer)
    ]


# --- blocks, and steps from depth to depth


def _skipped(kind: str, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    for block, (start, stop) in model.layers.items():
        # A depth inside of a block means the block too.
        depths = [depth for depth in (wanted.depths or ()) if start < depth <= stop]
        at = replace(wanted, depths=None) if depths else wanted
        inside = [n for n, link in enumerate(model.chain.connections) if start <= link.depth_in < stop]
        if _is_selected(at, stop, inside, block):
            edits = _state_before(kind, start, stop, model)
            yield Change(f"skip block {block}", kind, edits, block=block, depth=stop)


def _bypassed(kind: str, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    """The steps to the named depths at once, or one at a time where none is named."""
    depths = [depth for depth in _depths(wanted, model) if depth]
    spans = [(depths[0], depths[-1])] if wanted.depths and depths else [(depth, depth) for depth in depths]
    for first, last in spans:
        steps = f"steps to depths {first} … {last}" if last > first else f"step to depth {last}"
        edits = _state_before(kind, first - 1, last, model)
        yield Change(f"without the {steps}", kind, edits, depth=last)


def _state_before(kind: str, start: int, stop: int, model: ModelUnderTest) -> Edits:
    """The edit that puts the state at one depth in the place of that at a later one.

    Raises InterventionError: For a model whose blocks read more than the state before them.
    """
    if model.chain.over_depth or model.chain.history:
        raise InterventionError(
            f"{kind}: blocks of this model read sums over all earlier depths ({model.structure.family}), so that the "
            "state before a block is not what the later ones would read without it; patch or drop states at a depth instead"
        )

    def edit(state: torch.Tensor, seen: Seen) -> torch.Tensor:
        before = seen[start]
        if before.shape != state.shape:
            raise InterventionError(
                f"the block from depth {start} to {stop} turns a state of shape {tuple(before.shape)} into one of "
                f"{tuple(state.shape)} (sequence, token, stream, feature); a block that changes the shape cannot be skipped"
            )
        return before.clone()

    return {stop: edit}


# --- connections


def _remixed(kind: str, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    mixing = model.base.mixing
    if not mixing:
        raise InterventionError(
            f"{kind}: no connection of this model ({model.structure.family}) has a mixing matrix H_res to replace; "
            "each stream keeps its own state"
        )
    for number, known in mixing.items():
        link = model.chain.connections[number]
        if _is_selected(wanted, link.depth_out, [number], link.layer):
            name = f"H_res of connection {number} ({link.branch}, block {link.layer}): {kind}"
            edits = remixed(MATRICES[kind](known) - known, link)
            yield Change(name, kind, edits, block=link.layer, depth=link.depth_out, connection=number)


def remixed(difference: torch.Tensor, link: Connection) -> Edits:
    """The edit that adds a difference to the matrix of a connection, whose branch writes what it wrote."""

    def edit(state: torch.Tensor, seen: Seen) -> torch.Tensor:
        before = seen[link.depth_in]
        # In float64: the difference may be small against the state.
        moved = difference.to(before.device) @ before.double()
        return (state.double() + moved).to(state.dtype)

    return {link.depth_out: edit}


# --- streams


def _dropped(kind: str, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    streams = range(model.num_streams) if wanted.streams is None else wanted.streams
    if outside := [stream for stream in streams if not 0 <= stream < model.num_streams]:
        raise InterventionError(f"no stream {outside[0]}; the model has streams 0 … {model.num_streams - 1}")
    for depth in _depths(wanted, model):
        for stream in streams:
            edits: Edits = {depth: partial(_without_stream, stream)}
            name, block = f"drop stream {stream} at depth {depth}", model.chain.points[depth].layer
            yield Change(name, kind, edits, block=block, depth=depth, stream=stream)


def _without_stream(stream: int, state: torch.Tensor, seen: Seen) -> torch.Tensor:
    changed = state.clone()
    changed[:, :, stream] = 0
    return changed


MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda mix: torch.eye(mix.shape[-1], dtype=mix.dtype).expand_as(mix),
    "uniform": lambda mix: torch.full_like(mix, 1 / mix.shape[-1]),
}
"""What takes the place of H_res (B, T, N, N), by the kind of the experiment."""
