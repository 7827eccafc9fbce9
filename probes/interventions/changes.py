"""What does each kind of experiment change? A plan names places; each place becomes one experiment on a model under test.

States X_k are (B, T, N, D). A connection from depth k to k + 1 satisfies X_{k+1} = H_res X_k + H_post ⊗ F; with another
matrix the next state is X_{k+1} + (H_new − H_res) X_k, and the branch's write is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import ExperimentKind, kind_named
from depthscope.diagnostics.kernels.geometry import massive_activations
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.model_under_test import (
    Edit,
    ModelUnderTest,
    Passed,
)
from depthscope.probes.interventions.replacements import COLLAPSED, MATRICES

Numbers: TypeAlias = int | Iterable[int] | None


@dataclass(frozen=True)
class Plan:
    """What is to be tried, and where; without places every place of the model is tried, one at a time.

    Parameters
    ----------
    kind : str
        Name of an `ExperimentKind`.
    blocks, connections, depths, streams : tuple of int, optional
        Where.
    together : bool
        All places at once, as one experiment.
    source : object, optional
        Of ``patch``: where the states come from.
    tokens : tuple of int, optional
        Of ``patch`` and the stream kinds: the positions that are changed; all by default. Of ``skip_past`` the first half.
    """

    kind: str
    blocks: tuple[int, ...] | None = None
    connections: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    streams: tuple[int, ...] | None = None
    together: bool = False
    source: Any = None
    tokens: tuple[int, ...] | None = None


def plan(
    kind: str,
    *,
    blocks: Numbers = None,
    connections: Numbers = None,
    depths: Numbers = None,
    streams: Numbers = None,
    together: bool = False,
    source: Any = None,
    tokens: Numbers = None,
) -> Plan:
    """What is to be tried, and where.

    Parameters
    ----------
    kind : str
        ``"skip"``, ``"skip_past"``, ``"repeat"``, ``"swap"`` (of blocks); ``"identity"``, ``"uniform"``, ``"mean"``,
        ``"sinkhorn"`` (in place of H_res); ``"drop_stream"``, ``"freeze_stream"``, ``"rescue"``, ``"massive"``, ``"patch"``,
        ``"bypass"``, ``"merge_tokens"``, ``"without_mean"``, ``"one_direction"``, ``"merge_streams"`` (of the
        state at a depth).
    blocks, connections, depths, streams : int or iterable of int, optional
        Where; every place by default. A depth stands for the block or connection that ends there.
    together : bool
        All places at once, as one experiment.
    source : DataTree, batch or Module, optional
        Of ``"patch"``: a run, another batch of the same shape, or another model.
    tokens : int or iterable of int, optional
        Positions that are changed; of ``"skip_past"`` the later ones are measured.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        For an unknown kind.
    """
    found = kind_named(kind)
    if found.name == "patch" and source is None:
        raise InputError("patch needs source=: a run, another batch of the same shape, or another model")
    return Plan(
        found.name,
        _numbers(blocks),
        _numbers(connections),
        _numbers(depths),
        _numbers(streams),
        together,
        source,
        _numbers(tokens),
    )


def _numbers(given: Numbers) -> tuple[int, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, int) else tuple(int(number) for number in given)


@dataclass(frozen=True)
class Change:
    """One experiment: a name for people, where it is, and the edits of its forward.

    Parameters
    ----------
    name : str
        Such as ``"skip block 3"``.
    kind : str
        Its kind.
    edits : callable
        ``edits(model)`` returns the edits by depth; it may run the model to learn them.
    block, depth, connection, stream : int
        Where; −1 where it is none alone.
    compared : str
        Name of the change that this one undoes in part, for the share that is rescued.
    measured : Tensor, optional
        (B, T), true on the tokens that are measured; all by default.
    """

    name: str
    kind: str
    edits: Callable[[ModelUnderTest], Mapping[int, Edit]]
    block: int = -1
    depth: int = -1
    connection: int = -1
    stream: int = -1
    compared: str = ""
    measured: torch.Tensor | None = None


# --- from plans to changes


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
            f"{kind.name}: the model has no place that was asked for; {_places(kind, model)}"
        )
    return [_together(kind, found)] if wanted.together and len(found) > 1 else found


def _places(kind: ExperimentKind, model: ModelUnderTest) -> str:
    last = len(model.chain.points) - 1
    return (
        f"it has blocks {min(model.layers)} … {max(model.layers)}, depths 0 (embedding) … {last}, "
        f"{len(model.chain.connections)} connections and {model.num_streams} streams"
        + ("; massive activations are those above 100 and 1000 medians" if kind.name == "massive" else "")
    )


def _together(kind: ExperimentKind, found: list[Change]) -> Change:
    """All changes in one forward, from the first depth to the last."""

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        joined: dict[int, Edit] = {}
        for change in found:
            # Those of a later place are learnt with the earlier ones made: a matrix depends on the states before it.
            for depth, edit in change.edits(_Changed(model, joined) if joined else model).items():  # type: ignore[arg-type]
                before = joined.get(depth)
                joined[depth] = edit if before is None else _both(before, edit)
        return joined

    places = sorted({f"{change.block}" for change in found if change.block >= 0}, key=int)
    where = f"blocks {', '.join(places)}" if places else f"{len(found)} places"
    return Change(
        f"{kind.name} at {where} together", kind.name, edits, depth=min(change.depth for change in found)
    )


def _both(first: Edit, second: Edit) -> Edit:
    return lambda state, seen: second(first(state, seen), seen)


class _Changed:
    """A model under test with some edits made in every forward."""

    def __init__(self, model: ModelUnderTest, edits: Mapping[int, Edit]) -> None:
        self._model, self._edits = model, dict(edits)

    @cached_property
    def base(self) -> Passed:
        """The forward with these edits, made when something is to be learnt from it."""
        return self._model.forward(self._edits)

    def forward(self, edits: Mapping[int, Edit]) -> Passed:
        return self._model.forward({**self._edits, **edits})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _selected(depth: int, connections: Iterable[int], block: int, wanted: Plan) -> bool:
    given = [
        (wanted.depths, {depth}),
        (wanted.connections, set(connections)),
        (wanted.blocks, {block}),
    ]
    asked = [set(numbers) & here for numbers, here in given if numbers is not None]
    return not asked or all(asked)


# --- blocks


def _of_blocks(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    _require_sums_of_blocks(kind.name, model)
    layers = model.layers
    following = dict(zip(layers, list(layers)[1:], strict=False))
    for block, (start, stop) in layers.items():
        inside = [n for n, c in enumerate(model.chain.connections) if start <= c.depth_in < stop]
        # A depth inside of a block stands for the block too.
        depths = [depth for depth in (wanted.depths or ()) if start < depth <= stop]
        at = replace(wanted, depths=None) if depths else wanted
        if not _selected(stop, inside, block, at):
            continue
        if kind.name == "swap" and block not in following:
            continue
        yield {
            "skip": _skip,
            "skip_past": lambda block, model: _skip_past(block, wanted.tokens, model),
            "repeat": _repeat,
            "swap": lambda block, model: _swap(block, following[block], model),
        }[kind.name](block, model)


def _require_sums_of_blocks(kind: str, model: ModelUnderTest) -> None:
    if model.chain.over_depth or model.chain.history:
        raise InterventionError(
            f"{kind}: blocks of this model read sums over all earlier depths ({model.structure.family}), so that the "
            "state before a block is not what the later ones would read without it; patch or drop states at a depth instead"
        )


def _skip(block: int, model: ModelUnderTest) -> Change:
    start, stop = model.layers[block]

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {stop: lambda state, seen: _fitting(seen[start], state, start, stop).clone()}

    return Change(f"skip block {block}", "skip", edits, block=block, depth=stop)


def _skip_past(block: int, tokens: tuple[int, ...] | None, model: ModelUnderTest) -> Change:
    """The block is left out at early tokens; what changes at the later ones went from token to token (Csordás et al. 2025)."""
    start, stop = model.layers[block]
    early, later = _early_and_later(tokens, model)

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
            before = _fitting(seen[start], state, start, stop)
            return torch.where(early.to(state.device)[:, :, None, None], before, state)

        return {stop: edit}

    name = f"skip block {block} at the first tokens"
    return Change(name, "skip_past", edits, block=block, depth=stop, measured=later)


def _early_and_later(
    tokens: tuple[int, ...] | None, model: ModelUnderTest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are changed and which are measured, (B, T) each: the halves of each sequence, or those after the named."""
    shape = model.base.states[0].shape[:2]
    real = torch.ones(shape, dtype=torch.bool) if model.mask is None else model.mask.cpu()
    if tokens is None:
        early = real & (real.cumsum(1) <= real.sum(1, keepdim=True) // 2)
    else:
        early = real & _positions(tokens, shape[1])
    later = real & (
        torch.arange(shape[1]) > torch.where(early, torch.arange(shape[1]), -1).amax(1, keepdim=True)
    )
    if not bool((early.any(1) & later.any(1)).any()):
        raise InterventionError(
            f"skip_past: no sequence of the {shape[0]} x {shape[1]} tokens has changed tokens with later ones after them"
        )
    return early, later


def _repeat(block: int, model: ModelUnderTest) -> Change:
    start, stop = model.layers[block]

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {stop: _constant(_run_in_order(model, [(start, stop), (start, stop)]))}

    return Change(f"repeat block {block}", "repeat", edits, block=block, depth=stop)


def _swap(block: int, other: int, model: ModelUnderTest) -> Change:
    first, second = model.layers[block], model.layers[other]

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {second[1]: _constant(_run_in_order(model, [second, first]))}

    return Change(f"swap blocks {block} and {other}", "swap", edits, block=block, depth=second[1])


def _run_in_order(model: ModelUnderTest, order: list[tuple[int, int]]) -> torch.Tensor:
    """The state after some blocks that run in another order: each gets, in a forward of its own, what the one before gave."""
    state = model.base.states[min(start for start, _ in order)]
    for start, stop in order:
        state = model.forward({start: _constant(state)}).states[stop]
    return state


def _constant(value: torch.Tensor) -> Edit:
    def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
        if value.shape != state.shape:
            raise InterventionError(
                f"a state of shape {tuple(value.shape)} cannot take the place of one of {tuple(state.shape)} (sequence, "
                "token, stream, feature): the blocks between them change the width or the tokens"
            )
        return value.clone()

    return edit


def _fitting(value: torch.Tensor, state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if value.shape != state.shape:
        raise InterventionError(
            f"the block from depth {start} to {stop} turns a state of shape {tuple(value.shape)} into one of "
            f"{tuple(state.shape)} (sequence, token, stream, feature); a block that changes the shape cannot be skipped"
        )
    return value


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
        if _selected(link.depth_out, [number], link.layer, wanted):
            yield _remixed(kind.name, number, model)


def _remixed(rule: str, number: int, model: ModelUnderTest) -> Change:
    link = model.chain.connections[number]

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        known = model.base.mixing.get(number)
        if known is None:
            raise InterventionError(
                f"connection {number} ({link.path!r}) applies other weights than it computes, which are known in an unchanged "
                "forward alone; change one connection at a time"
            )
        difference = MATRICES[rule](known, model.mask) - known

        def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
            before = seen[link.depth_in]
            # In float64: the difference may be small against the state.
            moved = difference.to(before.device) @ before.double()
            return (state.double() + moved).to(state.dtype)

        return {link.depth_out: edit}

    name = f"H_res of connection {number} ({link.branch}, block {link.layer}): {rule}"
    return Change(name, rule, edits, block=link.layer, depth=link.depth_out, connection=number)


# --- states


def _of_depths(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    depths = [depth for depth in range(len(model.chain.points)) if _depth_selected(depth, wanted, model)]
    if kind.name in COLLAPSED:
        return (_collapsed(kind.name, depth, model) for depth in depths)
    made: dict[str, Callable[[], Iterator[Change]]] = {
        "massive": lambda: _without_massive(depths, model),
        "patch": lambda: _patches(depths, wanted, model),
        "rescue": lambda: _rescues(depths, wanted, model),
        "bypass": lambda: _bypassed([depth for depth in depths if depth], wanted, model),
        "drop_stream": lambda: _of_streams(_dropped, depths, wanted, model),
        "freeze_stream": lambda: _of_streams(_frozen, depths, wanted, model),
    }
    return made[kind.name]()


def _of_streams(
    make: Callable[..., Change], depths: list[int], wanted: Plan, model: ModelUnderTest
) -> Iterator[Change]:
    for depth in depths:
        for stream in _streams(wanted, model):
            yield make(depth, stream, wanted.tokens, model)


def _patches(depths: list[int], wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    states = _source_states(wanted, model)
    for depth in depths:
        if depth in states:
            yield _patched(depth, states[depth], wanted, model)


def _bypassed(depths: list[int], wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    """The steps to the named depths at once, or one at a time where none is named."""
    _require_sums_of_blocks("bypass", model)
    spans = [(depths[0], depths[-1])] if wanted.depths and depths else [(depth, depth) for depth in depths]
    for first, last in spans:
        yield _bypass(first, last)


def _bypass(first: int, last: int) -> Change:
    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {last: lambda state, seen: _fitting(seen[first - 1], state, first - 1, last).clone()}

    steps = f"steps to depths {first} … {last}" if last > first else f"step to depth {last}"
    return Change(f"without the {steps}", "bypass", edits, depth=last)


def _collapsed(kind: str, depth: int, model: ModelUnderTest) -> Change:
    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {depth: lambda state, seen: COLLAPSED[kind](state, model.mask)}

    return Change(f"{kind} at depth {depth}", kind, edits, block=model.chain.points[depth].layer, depth=depth)


def _depth_selected(depth: int, wanted: Plan, model: ModelUnderTest) -> bool:
    point = model.chain.points[depth]
    ends = [number for number, link in enumerate(model.chain.connections) if link.depth_out == depth]
    return _selected(depth, ends, point.layer, wanted)


def _streams(wanted: Plan, model: ModelUnderTest) -> Iterator[int]:
    for stream in range(model.num_streams) if wanted.streams is None else wanted.streams:
        if not 0 <= stream < model.num_streams:
            raise InterventionError(f"no stream {stream}; the model has streams 0 … {model.num_streams - 1}")
        yield stream


def _set_stream(state: torch.Tensor, stream: int, value: Any, tokens: tuple[int, ...] | None) -> torch.Tensor:
    changed = state.clone()
    if tokens is None:
        changed[:, :, stream] = value
    else:
        at = list(tokens)
        changed[:, at, stream] = value if not isinstance(value, torch.Tensor) else value[:, at]
    return changed


def _dropped(depth: int, stream: int, tokens: tuple[int, ...] | None, model: ModelUnderTest) -> Change:
    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {depth: lambda state, seen: _set_stream(state, stream, 0, tokens)}

    return Change(
        f"drop stream {stream} at depth {depth}",
        "drop_stream",
        edits,
        block=model.chain.points[depth].layer,
        depth=depth,
        stream=stream,
    )


def _frozen(depth: int, stream: int, tokens: tuple[int, ...] | None, model: ModelUnderTest) -> Change:
    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
            return _set_stream(state, stream, seen[depth][:, :, stream], tokens)

        return dict.fromkeys(range(depth + 1, len(model.chain.points)), edit)

    return Change(
        f"freeze stream {stream} from depth {depth}",
        "freeze_stream",
        edits,
        block=model.chain.points[depth].layer,
        depth=depth,
        stream=stream,
    )


def _rescues(depths: list[int], wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    """A stream is removed at the first depth, and put back at each later one; the first of them is the removal alone."""
    for stream in _streams(wanted, model):
        removed = _dropped(depths[0], stream, wanted.tokens, model) if depths else None
        if removed is None:
            return
        yield removed
        for back in depths[1:]:
            yield _put_back(removed, back, wanted.tokens)


def _put_back(removed: Change, back: int, tokens: tuple[int, ...] | None) -> Change:
    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        original = model.base.states[back][:, :, removed.stream]
        return {
            **removed.edits(model),
            back: lambda state, seen: _set_stream(state, removed.stream, original, tokens),
        }

    return replace(
        removed,
        name=f"{removed.name}, put back at depth {back}",
        kind="rescue",
        edits=edits,
        depth=back,
        compared=removed.name,
    )


def _without_massive(depths: list[int], model: ModelUnderTest) -> Iterator[Change]:
    for depth in depths:
        state = model.base.states[depth]
        # Streams of one token are one row: a massive entry is so against all of the sequence's.
        found = massive_activations(
            state.flatten(2).float().cpu(), mask=None if model.mask is None else model.mask.cpu()
        )
        if not bool(found.any()):
            continue
        at = found.reshape(state.shape).to(state.device)
        features = sorted({int(f) for f in at.nonzero()[:, 3].unique()})

        def edits(model: ModelUnderTest, depth: int = depth, at: torch.Tensor = at) -> Mapping[int, Edit]:
            return {depth: lambda value, _: value.masked_fill(at, 0)}

        name = f"zero {int(at.sum())} massive entries at depth {depth} (features {', '.join(map(str, features[:4]))})"
        yield Change(name, "massive", edits, block=model.chain.points[depth].layer, depth=depth)


def _patched(depth: int, value: torch.Tensor, wanted: Plan, model: ModelUnderTest) -> Change:
    streams = None if wanted.streams is None else list(_streams(wanted, model))
    chosen = torch.ones(value.shape[1:3], dtype=torch.bool)
    if wanted.tokens is not None:
        chosen &= _positions(wanted.tokens, len(chosen))[:, None]
    if streams is not None:
        chosen &= _positions(tuple(streams), chosen.shape[1])
    edit = replaced_state(value, chosen)
    return Change(
        f"patch depth {depth}",
        "patch",
        lambda model: {depth: edit},
        block=model.chain.points[depth].layer,
        depth=depth,
        stream=streams[0] if streams and len(streams) == 1 else -1,
    )


def replaced_state(value: torch.Tensor, chosen: torch.Tensor) -> Edit:
    """Another state at some tokens and streams, (T, N)."""

    def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
        new = _constant(value.to(state.device, state.dtype))(state, seen)
        return torch.where(chosen.to(state.device)[None, :, :, None], new, state)

    return edit


def _positions(numbers: tuple[int, ...], count: int) -> torch.Tensor:
    outside = [number for number in numbers if not 0 <= number < count]
    if outside:
        raise InterventionError(f"position {outside[0]} is outside of 0 … {count - 1}")
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[list(numbers)] = True
    return chosen


def _source_states(wanted: Plan, model: ModelUnderTest) -> Mapping[int, torch.Tensor]:
    """States by depth from what ``source=`` names: a run's trace, another model, or another batch."""
    source = wanted.source
    trace = _trace_of(source)
    if trace is None:
        return model.sibling(source).base.states
    states = torch.as_tensor(
        trace["residual"].transpose("depth", "sample", "token", "stream", "feature").values
    )
    if states.shape[1:] != tuple(model.base.states[0].shape) or len(states) != len(model.chain.points):
        raise InterventionError(
            f"the run has {states.shape[0]} depths of {tuple(states.shape[1:])} (sequence, token, stream, feature), the model "
            f"{len(model.chain.points)} of {tuple(model.base.states[0].shape)}; expected a run of the same text, with every "
            "sequence of the batch kept"
        )
    return dict(enumerate(states))


def _trace_of(source: Any) -> Any:
    """The trace of a run; None for what is no run."""
    if not isinstance(source, xr.DataTree):
        return None
    if "trace" not in source.children:
        raise InterventionError("the run has no raw states; expected one that was captured with them")
    trace = source["trace"].to_dataset()
    if "residual" not in trace:
        raise InterventionError("the run has several chains, or no raw states; expected one of one chain")
    return trace
