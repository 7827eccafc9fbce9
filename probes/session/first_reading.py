"""What a first forward shows of a model, by which all later ones are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Report
from depthscope.probes.model.modules import module_types
from depthscope.probes.model.preserved_state import no_collection
from depthscope.probes.reading.places import KnownPlaces
from depthscope.probes.session.attention import AttentionPlaces, placed_attention
from depthscope.probes.session.connection_parameters import ConnectionParameters
from depthscope.probes.session.find_structure import AxisError, StructureFinder
from depthscope.probes.session.first_forward import RewrittenError, out_of_sight, replay
from depthscope.probes.session.forward import Forward, Tape, own_call, own_calls
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.session.step import Step
from depthscope.probes.structure.chain import ChainError
from depthscope.probes.structure.model_structure import Structure, require_same


class FirstReading:
    """What is known of a model from its first measured forward, and again where modules came or went since.

    ``scope``: how much of a forward is measured.
    ``step``: of the session; its sample begins anew where a first forward counts for nothing.
    ``loss_scale``: gives the factor by which the loss is multiplied at present; None for 1.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        scope: Scope,
        step: Step,
        loss_scale: Callable[[], torch.Tensor | None] | None,
        report: Report,
    ):
        self.model, self.options, self.scope = model, options, scope
        self._step, self._loss_scale, self._report = step, loss_scale, report
        self.observer: Observer | None = None
        self.attention = AttentionPlaces()
        # Forwards of ours are changed on purpose, as in interventions: each is recorded in full.
        self.places = None if scope.only_own else KnownPlaces()
        self._attention_is_known = True  # or the second one, where the first was counted along the wrong axis
        self._first_batch_axis = 0  # of the model's first tensor, as the first forward assumes it
        self._modules: frozenset[tuple[str, type]] = frozenset()  # of the model, when the observer was made

    @property
    def is_needed(self) -> bool:
        """Whether the next forward is a first one."""
        return (
            self.observer is None
            or not self._attention_is_known
            or self._modules != module_types(self.model)  # the structure must be as it was
        )

    @property
    def is_recorded(self) -> bool:
        """Whether every measured forward is traced, since nothing else shows the weights of the connections."""
        return self.observer is not None and self.observer.structure.is_recorded

    @property
    def batch_axis(self) -> int:
        """The axis of the sequences in the model's first tensor, as far as it is known."""
        return self._first_batch_axis if self.observer is None else self.observer.structure.batch_axis

    @property
    def first_attention(self) -> int | None:
        """Of how many sequences a forward looks at what they attend to; None where it is not looked for.

        A loop does so where the site is named: it costs more than the rest of a measured step.
        """
        selection = self.options.selection
        if not selection.includes("attention") or not (self.scope.only_own or selection.requests):
            return None
        return self.options.max_sequences if self.scope.sums else 0  # only where it lies

    @property
    def later_attention(self) -> int | None:
        """The same of a later forward that is traced."""
        return self.options.max_sequences if self.attention.heads else None

    def end(self, tape: Tape, forward: Forward) -> None:
        """Find the structure in a forward that has ended, and record what that forward showed of it."""
        try:
            with no_collection():
                structure = self._structure(tape, forward)
            if self.observer is not None:
                require_same(structure, self.observer.structure)
            # Before the states: where these have to be copied in one more forward, it is not traced again.
            self._place_attention(tape, forward, structure)
            observer = self._new_observer(structure, tape)
            try:
                with own_call(observer):  # what it runs once more is nobody's forward
                    replay(tape, forward, observer)
            except RewrittenError:
                self._adopt(observer)  # the structure is right: later forwards copy states as they pass
                if not self._step.num_forwards and self._step.is_empty:
                    self._step.draw_anew()  # nothing of this forward counts, and its sequences come again
                raise
            self._adopt(observer)
        except ChainError as error:
            reason = out_of_sight(self.model, forward)
            raise ChainError(f"{reason}; {error}") if reason else error from None
        except AxisError:
            self._first_batch_axis = 1
            self._step.draw_anew()  # tokens were drawn
            raise

    def _structure(self, tape: Tape, forward: Forward) -> Structure:
        if tape.recorder is None:
            raise CaptureError("the model's own forward did not run")
        finder = StructureFinder(tape.graph, self.model, self.options, forward.batch_size, forward.batch_axis)
        try:
            return finder.structure()
        except AxisError:
            # A forward of ours runs once more. The user's does not: its step would be lost.
            if own_calls.owner is not None:
                raise
            self._count_along_other_axis(tape, forward)
            return finder.along(1, forward.batch_size).structure()

    def _count_along_other_axis(self, tape: Tape, forward: Forward) -> None:
        """Draw the sequences of the first forward again: they are along the second axis of what the model was called with."""
        assert forward.lead is not None
        self._step.draw_anew()
        for name, value in self._step.reservoir.drawn(forward.lead, 1, forward.stamp).items():
            setattr(forward, name, value)
        # What its tokens attend to was looked at for the wrong sequences: the next forward shows it.
        tape.attention, forward.attention = None, {}
        self._attention_is_known = self.first_attention is None

    def _place_attention(self, tape: Tape, forward: Forward, structure: Structure) -> None:
        """Find out where the model attends, and how much of it is looked at from now on."""
        if (self.observer is None) != self._attention_is_known:
            return  # known already, or not to be seen in this forward
        self._attention_is_known = True
        self.attention = placed_attention(tape, forward, structure)
        selection = self.options.selection
        if selection.requests:
            selection.require_attention(structure.chains, self.attention.heads, self.attention.reasons)

    def _new_observer(self, structure: Structure, tape: Tape) -> Observer:
        parameters = None
        if self.scope.is_loop and structure.connections:  # of a capture's one set of weights no value moves
            parameters = ConnectionParameters(self.model, structure)
        return Observer(
            structure,
            self.options,
            self._report,
            self._loss_scale,
            self.scope,
            calls=Counter(call.path for call in tape.graph.calls),
            times={(chain, depth): point.moment_in(tape.graph) for chain, depth, point in structure.captured},
            parameters=parameters,
        )

    def _adopt(self, observer: Observer) -> None:
        if self.places is not None:
            self.places.forget()
        self.observer, self._modules = observer, module_types(self.model)
