"""What does each experiment on the states at a depth change? Streams, tokens and directions, set to other values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import xarray as xr

from depthscope.diagnostics.experiments import ExperimentKind
from depthscope.diagnostics.kernels.geometry import massive_activations
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.gathered import Gathered
from depthscope.probes.interventions.model_under_test import Edit, ModelUnderTest
from depthscope.probes.interventions.plans import (
    Change,
    Plan,
    between,
    bypassing,
    constant,
    positions,
    require_sums_of_blocks,
    selected,
)
from depthscope.probes.interventions.replacements import COLLAPSED


def of_depths(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    """The experiments of a plan on states."""
    depths = [depth for depth in range(len(model.chain.points)) if _depth_selected(depth, wanted, model)]
    if kind.name in COLLAPSED:
        return (_collapsed(kind.name, depth, model) for depth in depths)
    made: dict[str, Callable[[], Iterator[Change]]] = {
        "massive": lambda: _without_massive(depths, model),
        "patch": lambda: _patches(depths, wanted, model),
        "rescue": lambda: _rescues(depths, wanted, model),
        "bypass": lambda: _bypassed([depth for depth in depths if depth], wanted, model),
        "without_attention": lambda: _without_attention([depth for depth in depths if depth], wanted),
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
    require_sums_of_blocks("bypass", model)
    spans = [(depths[0], depths[-1])] if wanted.depths and depths else [(depth, depth) for depth in depths]
    for first, last in spans:
        if model.chain.over_depth and not between(first - 1, last, model):
            continue  # nothing is added there: the state is read anew
        steps = f"steps to depths {first} … {last}" if last > first else f"step to depth {last}"
        yield Change(f"without the {steps}", "bypass", bypassing(first - 1, last), depth=last)


def _without_attention(depths: list[int], wanted: Plan) -> Iterator[Change]:
    """No attention on the way to the named depths at once, or to one at a time where none is named."""
    for span in [depths] if wanted.depths and depths else [[depth] for depth in depths]:
        steps = f"depths {span[0]} … {span[-1]}" if len(span) > 1 else f"depth {span[0]}"
        # What is gathered is zero: there is no state to be changed.
        edits = dict.fromkeys(map(Gathered, span), constant(torch.zeros(())))
        yield Change(
            f"without the attention on the way to {steps}",
            "without_attention",
            lambda model, edits=edits: edits,  # type: ignore[misc]
            depth=span[-1],
        )


def _collapsed(kind: str, depth: int, model: ModelUnderTest) -> Change:
    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {depth: lambda state, seen: COLLAPSED[kind](state, model.mask)}

    return Change(f"{kind} at depth {depth}", kind, edits, block=model.chain.points[depth].layer, depth=depth)


def _depth_selected(depth: int, wanted: Plan, model: ModelUnderTest) -> bool:
    point = model.chain.points[depth]
    ends = [number for number, link in enumerate(model.chain.connections) if link.depth_out == depth]
    return selected(depth, ends, point.layer, wanted)


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
        chosen &= positions(wanted.tokens, len(chosen))[:, None]
    if streams is not None:
        chosen &= positions(tuple(streams), chosen.shape[1])
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
        new = constant(value.to(state.device, state.dtype))(state, seen)
        return torch.where(chosen.to(state.device)[None, :, :, None], new, state)

    return edit


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
