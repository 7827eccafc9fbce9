"""A model and one batch, to be run again and again with some of its states changed; the model itself is never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from depthscope.diagnostics.errors import did_you_mean
from depthscope.probes.connections.proof import Parts, StreamConnectionError, gather_evidence, relative_error
from depthscope.probes.interventions.predictions import Pick, Targets, find_targets, output_values
from depthscope.probes.interventions.state_operations import (
    Change,
    Depth,
    StateOperations,
    StatePlace,
    repeats,
    same_values,
)
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.model.modules import require_module
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.reading.tensor_memory import stacked
from depthscope.probes.run.build_run import build_run, sampled_joints
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model, copied
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.session.session import Session
from depthscope.probes.session.step import Reservoir
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.model_structure import FINAL

# By how much the last state may differ where only rounding does: batches in another order; a heuristic of ours.
AROUND = 1e-2
EVERY_SEQUENCE = 2**20  # sequences of one batch that are stored: all of them

Seen: TypeAlias = Mapping[int, torch.Tensor]
Edit: TypeAlias = Callable[[torch.Tensor, Seen], torch.Tensor]
"""``edit(state, seen)``: the new state (B, T, N, D), from the one that was computed and the earlier ones by depth."""
Shown: TypeAlias = Callable[[int, torch.Tensor, tuple[torch.Tensor, ...]], None]


@dataclass
class Passed:
    """What one forward showed.

    ``output``: what the model returned.
    ``states``: (B, T, N, D) by depth, as they were passed on.
    ``connections``: of every connection of streams, on the CPU; H_res is destination by source, as it is applied.
    """

    output: Any
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    connections: dict[int, Parts] = field(default_factory=dict)

    @property
    def mixing(self) -> dict[int, torch.Tensor]:
        """H_res of every connection that mixes, (B, T, N, N), destination by source, float64 on the CPU."""
        found = {number: parts.mix for number, parts in self.connections.items()}
        return {number: mix.double() for number, mix in found.items() if mix is not None}


class ModelUnderTest:
    """One model and one batch; `forward` runs it with some states changed.

    ``model``: the model. Its weights, buffers, hooks and modes, and all random states, are as before after every
    forward.
    ``batch``: one batch.
    ``options``: how the model is read.
    ``chain``: which of several chains is changed; the first by default.
    Raises CaptureError: Where the model cannot be read, or two forwards of the same batch differ.
    """

    def __init__(
        self, model: nn.Module, batch: Any, options: Options | None = None, *, chain: str | None = None
    ) -> None:
        require_module(model)
        self.model = model
        self.batch = batch
        given, taken = options or Options(), ("layers", "layout", "streams", "mask", "sites")
        own = Options(**{name: getattr(given, name) for name in taken}, max_sequences=EVERY_SEQUENCE)
        self._session = Session(model, own, scope=Scope(only_own=True, sums=False))
        self._read_model()
        self.structure = self._session.structure
        names = [each.name for each in self.structure.chains]
        if chain not in (None, *names):
            raise InterventionError(f"no chain {chain!r} in this model; {did_you_mean(str(chain), names)}")
        self.number = 0 if chain is None else names.index(chain)
        self.chain: Chain = self.structure.chains[self.number]
        self._places: dict[Depth, StatePlace | None] = {}
        self._num_sequences = 0
        # Whether the next states were recomputed from the parts of an unchanged forward.
        self._are_proven = self._proven_over_depth = False
        self.mask: torch.Tensor | None = None  # (B, T), true on real tokens
        operations = StateOperations(model)
        found = self._run(operations.on(), lambda: self._locate(operations))
        self.base = self.forward({})
        if not repeats(found.output, self.base.output):
            raise InterventionError(
                "two forwards of the same batch gave different outputs, with the same random states: the model draws from a "
                "source of its own, or remembers earlier calls; expected a model that repeats itself, such as model.eval()"
            )

    def values_again(self, batch: Any, pick: Pick | None = None) -> torch.Tensor:
        """The main output (B, T, V) of the unchanged model on another batch."""
        with self.unchanged_model(), torch.no_grad(), own_call(self._session.owner):
            return self.values(call_model(self.model, copied(batch)), pick)

    def targets(self, logits: torch.Tensor, pick: Pick | None = None) -> Targets:
        """What the output is compared with, asked of the model itself: see `find_targets`.

        ``logits``: (B, T, V) of its unchanged output.
        """
        return find_targets(
            self.batch,
            self.base.output,
            logits,
            mask=self.mask,
            width=self.base.states[max(self.base.states)].shape[-1],
            again=lambda batch: self.values_again(batch, pick),
            picked=pick is not None,
        )

    def other_paths(self) -> str:
        """What leads around the state in the middle of the model; empty where nothing does.

        The states in the middle are exchanged between the sequences. If nothing else leads from before them to the last
        state, that one is then the other sequence's, whatever comes between.
        """
        last, middle = len(self.chain.points) - 1, len(self.chain.points) // 2
        # Random masks belong to a row, not to a sequence.
        mixes = any(module.training for module in self.model.modules())
        if mixes or len(self.base.states[0]) < 2 or middle == last:
            return ""
        try:
            passed = self.forward({middle: lambda state, seen: state.roll(1, 0)})
        except InterventionError:
            return ""
        expected = self.base.states[last].roll(1, 0).double()
        apart = relative_error(passed.states[last].double() - expected, expected)
        if apart <= AROUND:
            return ""
        return (
            f"more than the state at depth {middle} leads to the last one (with the states of other sequences there, it "
            f"differs from theirs by {apart:.1%}): embeddings of the ids, masks or skips over depth go around a changed state"
        )

    # --- what the model is

    def _read_model(self) -> None:
        session = self._session
        with self.unchanged_model(), session.on():  # around the hooks, which it would put back
            session.call(copied(self.batch))
            session.raise_first_error()
            session.fold()

    def _locate(self, operations: StateOperations) -> None:
        """Note where each state was made, as it is shown."""
        there: dict[int, int] = {}  # by chain: with which value the state before was there

        def shown(number: int, depth: int, tensor: torch.Tensor, own: tuple[torch.Tensor, ...]) -> None:
            if depth != FINAL:
                self._places[number, depth], there[number] = operations.state_place(
                    own, there.get(number, -1)
                )

        self._session.observer.on_state = shown

    @property
    def layers(self) -> dict[int, tuple[int, int]]:
        """The depths before and after each block, by the block's number."""
        found: dict[int, tuple[int, int]] = {}
        end = 0
        if self.chain.over_depth:  # what a block reads is made by the sums after the one before
            for link in self.chain.connections:
                found[link.layer] = found.get(link.layer, (link.depth_in, 0))[0], link.depth_out
            return found
        for depth, point in enumerate(self.chain.points):
            if point.layer < 0:
                continue
            # What changes the streams before a block begins belongs to that block, and what joins two stages to none.
            shapes = self.chain.shapes[max(depth - 1, 0)], self.chain.shapes[depth]
            begin = depth if point.site == "pre" and shapes[0] != shapes[1] else end
            found[point.layer] = found.get(point.layer, (begin, depth))[0], depth
            end = depth
        return found

    @property
    def num_streams(self) -> int:
        """Number of residual streams."""
        return self.base.states[0].shape[2] if 0 in self.base.states else self.structure.num_streams

    @property
    def proof(self) -> str:
        """Whether the reading of the chain is proven: ``proven``, or ``unproven: …`` with the reason."""
        return "proven" if self._are_proven else self.chain.proof or "unproven: no proof was made"

    # --- running it

    def forward(self, edits: Mapping[int, Edit], *, checked: bool = True) -> Passed:
        """Run the model with the states at some depths changed; everything after a state follows from the changed one.

        ``edits``: by depth. An edit that returns the very tensor it was given changes nothing.
        ``checked``: whether the states are compared with those that are shown, and the connections read. Without it a
        forward takes a third of the time; for further changes at places where an earlier forward was checked.
        Raises InterventionError: Where a state cannot be changed, or its change did not arrive where the state is
        shown.
        """
        for depth in edits:
            self._require_place(depth)
        states: dict[int, torch.Tensor] = {}
        places = {
            key: place for key, place in self._places.items() if key[0] == self.number and place is not None
        }
        operations = StateOperations(self.model, places, self._change(edits, states))
        if checked:
            passed = self._run(operations.on(), lambda: self._check(states, edited=bool(edits)))
        else:
            with self.unchanged_model(), operations.on(), torch.no_grad():
                passed = Passed(call_model(self.model, copied(self.batch)))
        for depth in edits:
            # An operation that did not run again, or ran twice, has changed another state or none.
            if (times := operations.met[self.number, depth]) != 1:
                raise InterventionError(
                    f"the state at depth {depth} was made {times} times in the changed forward, once before: the model "
                    "computes it in another way when an earlier state changes"
                )
        passed.states = states
        return passed

    def _change(self, edits: Mapping[int, Edit], states: dict[int, torch.Tensor]) -> Change:
        """The change of states, in the model's own layout; ``states`` get what they are passed on as."""

        def change(at: Depth, native: torch.Tensor) -> torch.Tensor:
            state = self.canonical(native, at[1])
            edit = edits.get(at[1])
            changed = state if edit is None else edit(state, states)
            if changed is state:
                states[at[1]] = state.clone()
                return native
            if changed.shape != state.shape:
                raise InterventionError(
                    f"depth {at[1]}: got a state of shape {tuple(changed.shape)} for one of {tuple(state.shape)} (sequence, "
                    "token, stream, feature); expected the same shape"
                )
            states[at[1]] = changed.to(state.dtype).clone()
            return self.native(states[at[1]], native, at[1])

        return change

    def observed(self, mode: AbstractContextManager[Any], shown: Shown, batch: Any = None) -> Any:
        """What the unchanged model returns under one more mode; ``shown(depth, state, own)`` gets the states in the model's
        own layout, and its tensors that hold them.

        ``batch``: another one of the same shape.
        """

        def listen() -> None:
            self._session.observer.on_state = lambda number, depth, tensor, own: (
                shown(depth, tensor, own) if number == self.number and depth != FINAL else None
            )

        return self._run(mode, listen, batch).output

    def _run(
        self, mode: AbstractContextManager[Any], listen: Callable[[], None], batch: Any = None
    ) -> Passed:
        session = self._session
        session.step.reservoir = Reservoir(EVERY_SEQUENCE, 0)
        with self.unchanged_model(), session.on():
            try:
                listen()
                with mode, torch.no_grad(), own_call(session.owner):
                    output = call_model(self.model, copied(self.batch if batch is None else batch))
                unread = [isinstance(error, StreamConnectionError) for error in session.errors]
                if self._are_proven and unread and all(unread):
                    # A state that is changed inside of its connection's own method no longer follows from the weights.
                    return Passed(output)
                session.raise_first_error()
                assert session.step.last is not None
                self.mask = session.step.last.masks.get(self.number)
                if self.chain.over_depth and not self._proven_over_depth:
                    # Of a chain whose branches read sums over depth the proof is made where a run is built.
                    build_run(session, None, [], described=True)
                    self._proven_over_depth = True
                passed = Passed(output, connections={} if self.number else self._parts())
                session.fold()
                return passed
            finally:
                session.observer.on_state = None

    @contextmanager
    def unchanged_model(self) -> Iterator[None]:
        """A forward made inside leaves nothing behind, and runs as the model is written: see `preserved_state`."""
        with preserved_state(self.model):
            yield

    def _check(self, states: dict[int, torch.Tensor], *, edited: bool) -> None:
        """Require that each state is shown as it was made: what was written there must be what every reader gets."""

        def shown(number: int, depth: int, tensor: torch.Tensor, own: tuple[torch.Tensor, ...]) -> None:
            if number != self.number or depth == FINAL:
                return
            # Each of several tensors is changed with the last of them, and was shown before.
            state = self.canonical(stacked(own) if len(own) > 1 else tensor, depth)
            if depth not in states:
                # Made outside of the forward, or by no operation that was found again.
                states[depth] = state.clone()
            elif same_values(state, states[depth]):
                return
            elif not edited:
                # Code that torch does not see, such as a kernel of its own, has written it since: it is read, not changed.
                self._places[number, depth] = None
                states[depth] = state.clone()
            else:
                raise InterventionError(
                    f"the state at depth {depth} was written once more after it was made; "
                    "it cannot be changed in a way that all of its readers see"
                )

        self._session.observer.on_state = shown

    def _require_place(self, depth: int) -> None:
        if not 0 <= depth < len(self.chain.points):
            raise InterventionError(
                f"depth {depth} is none of the model's; it has depths 0 (embedding) … {len(self.chain.points) - 1}"
            )
        point, place = self.chain.points[depth], self._places.get((self.number, depth))
        if place is None and point.streams:
            raise InterventionError(
                f"the state at depth {depth} is held by {len(point.streams)} tensors, one for each stream, of which one "
                "is made by no operation of the forward that torch shows, or is read before the others are made, so that a "
                "change of all would reach its readers too late; change another depth, or skip blocks"
            )
        if place is None:
            raise InterventionError(
                f"the state at depth {depth} ({point.at} of {point.path or 'the model'}) is made by no operation of the "
                "forward that torch shows: it is a parameter as it is, or written by a kernel outside of torch; change "
                "another depth"
            )
        same = [
            f"depth {other}"
            + (f" of {self.structure.chains[number].name!r}" if number != self.number else "")
            for (number, other), shared in self._places.items()
            if shared == place and (number, other) != (self.number, depth)
        ]
        if same:
            raise InterventionError(
                f"the state at depth {depth} is the very tensor of the state at {same[0]}, since nothing between them "
                "computes another one; it cannot be changed at one of them alone"
            )

    # --- layouts

    def canonical(self, native: torch.Tensor, depth: int) -> torch.Tensor:
        """A state as (B, T, N, D); a view where the layout allows it."""
        return self.structure.canonical(self.number, native.detach(), self._batch_size, depth)

    def native(self, state: torch.Tensor, like: torch.Tensor, depth: int) -> torch.Tensor:
        """A state (B, T, N, D) in the model's own layout."""
        # Numbered entries are rearranged as the state is: its layout is known in one place only.
        numbers = self.canonical(torch.arange(like.numel(), device=like.device).reshape(like.shape), depth)
        values = torch.empty_like(state.reshape(-1))
        values[numbers.reshape(-1)] = state.reshape(-1)
        return values.reshape(like.shape)

    def values(self, output: Any, pick: Pick | None = None) -> torch.Tensor:
        """The main output as (B, T, V): see `output_values`."""
        return output_values(output, pick, batch_axis=self.structure.batch_axis)

    @property
    def _batch_size(self) -> int:
        forward = self._session.step.last or self._session._current.forward
        if forward is not None:
            self._num_sequences = forward.batch_size
        return self._num_sequences

    def _parts(self) -> dict[int, Parts]:
        """The coefficients of the last forward by the number of the connection, on the CPU.

        Raises ReconstructionError: Where those of the first forward do not give its states.
        """
        joints = sampled_joints(self._session, self._session.step.reservoir.in_order())
        # In the first alone: a changed one does not satisfy its own equation
        if joints and not self._are_proven:
            gather_evidence(joints)
            self._are_proven = True
        return {number: joint.parts for number, joint in enumerate(joints)}
