"""What does each kind of experiment change? A plan names places; each place becomes one experiment on a model under test.

States X_k are (B, T, N, D). A connection from depth k to k + 1 satisfies X_{k+1} = H_res X_k + H_post ⊗ F; with another
matrix the next state is X_{k+1} + (H_new − H_res) X_k, and the branch's write is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from depthscope.diagnostics.experiments import ExperimentKind, kind_named
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.model_under_test import Edit, ModelUnderTest, Passed
from depthscope.probes.interventions.plans import (
    Change,
    Plan,
    between,
    bypassing,
    constant,
    fitting,
    positions,
    require_sums_of_blocks,
    selected,
)
from depthscope.probes.interventions.replacements import MATRICES
from depthscope.probes.interventions.state_changes import of_depths


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
    made = {"block": _of_blocks, "connection": _of_connections, "depth": of_depths}[kind.unit](
        kind, wanted, model
    )
    found = list(made)
    if not found:
        raise InterventionError(
            f"{kind.name}: none of the {kind.unit}s that were asked for exists; {_places(kind, model)}"
        )
    return [_together(kind, found)] if wanted.together and len(found) > 1 else found


def _places(kind: ExperimentKind, model: ModelUnderTest) -> str:
    last = len(model.chain.points) - 1
    return (
        f"the model has blocks {min(model.layers)} … {max(model.layers)}, depths 0 (embedding) … {last}, "
        f"{len(model.chain.connections)} connections and {model.num_streams} stream{'s' * (model.num_streams != 1)}"
        + ("; massive activations are those above 100 and 1000 medians" if kind.name == "massive" else "")
    )


def _together(kind: ExperimentKind, found: list[Change]) -> Change:
    """All changes in one forward, from the first depth to the last."""

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        joined: dict[int, Edit] = {}
        for change in found:
            # Those of a later place are learnt with the earlier ones made: a matrix depends on the states before it.
            for depth, edit in change.edits(_Changed(model, joined) if joined else model).items():  # type: ignore[arg-type]
                joined[depth] = partial(_in_turn, joined[depth], edit) if depth in joined else edit
        return joined

    places = sorted({f"{change.block}" for change in found if change.block >= 0}, key=int)
    where = f"blocks {', '.join(places)}" if places else f"{len(found)} places"
    return Change(
        f"{kind.name} at {where} together", kind.name, edits, depth=min(change.depth for change in found)
    )


def _in_turn(first: Edit, second: Edit, state: torch.Tensor, seen: Any) -> torch.Tensor:
    return second(first(state, seen), seen)


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


# --- blocks


def _of_blocks(kind: ExperimentKind, wanted: Plan, model: ModelUnderTest) -> Iterator[Change]:
    require_sums_of_blocks(kind.name, model)
    layers = model.layers
    following = dict(zip(layers, list(layers)[1:], strict=False))
    for block, (start, stop) in layers.items():
        inside = between(start, stop, model)
        # A depth inside of a block means the block too.
        depths = [depth for depth in (wanted.depths or ()) if start < depth <= stop]
        at = replace(wanted, depths=None) if depths else wanted
        if not selected(stop, inside, block, at):
            continue
        if kind.name == "swap" and block not in following:
            continue
        yield {
            "skip": _skip,
            "skip_past": lambda block, model: _skip_past(block, wanted.tokens, model),
            "repeat": _repeat,
            "swap": lambda block, model: _swap(block, following[block], model),
        }[kind.name](block, model)


def _skip(block: int, model: ModelUnderTest) -> Change:
    start, stop = model.layers[block]
    return Change(f"skip block {block}", "skip", bypassing(start, stop), block=block, depth=stop)


def _skip_past(block: int, tokens: tuple[int, ...] | None, model: ModelUnderTest) -> Change:
    """The block is left out at early tokens; what changes at the later ones went from token to token (Csordás et al. 2025)."""
    start, stop = model.layers[block]
    early, later = _early_and_later(tokens, model)

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
            before = fitting(seen[start], state, start, stop)
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
    half = real.cumsum(1) <= real.sum(1, keepdim=True) // 2
    early = real & (half if tokens is None else positions(tokens, shape[1]))
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
        return {stop: constant(_run_in_order(model, [(start, stop), (start, stop)]))}

    return Change(f"repeat block {block}", "repeat", edits, block=block, depth=stop)


def _swap(block: int, other: int, model: ModelUnderTest) -> Change:
    first, second = model.layers[block], model.layers[other]

    def edits(model: ModelUnderTest) -> Mapping[int, Edit]:
        return {second[1]: constant(_run_in_order(model, [second, first]))}

    return Change(f"swap blocks {block} and {other}", "swap", edits, block=block, depth=second[1])


def _run_in_order(model: ModelUnderTest, order: list[tuple[int, int]]) -> torch.Tensor:
    """The state after some blocks that run in another order: each gets, in a forward of its own, what the one before gave."""
    state = model.base.states[min(start for start, _ in order)]
    for start, stop in order:
        state = model.forward({start: constant(state)}).states[stop]
    return state


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
