"""Whether a model is compiled, and whether a step can be measured inside of its compiled code."""

from __future__ import annotations

import weakref

from torch import distributed as dist
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Report
from depthscope.probes.reading.places import KnownPlaces
from depthscope.probes.session.compiled_calls import (
    CompiledCalls,
    compiled_callers,
    compiler_is_loaded,
    require_no_exchange,
)
from depthscope.probes.session.compiled_regions import fuses, regions_of
from depthscope.probes.session.forward import CurrentForward, Tape
from depthscope.probes.session.in_graph import InGraph
from depthscope.probes.session.observer import Observer
from depthscope.probes.structure.model_structure import ShownTensor


class CompiledModel:
    """The compiled code of a session's model, as far as there is any."""

    def __init__(self, model: nn.Module, current: CurrentForward, report: Report):
        self.model, self._current, self._report = model, current, report
        self.in_graph: InGraph | None = None
        self.seen = False  # whether a call of the model was seen since `callers` was asked last
        self.calls: CompiledCalls | None = None  # of a step that is measured by forwards of ours
        self._observer: Observer | None = None
        self._settled = False  # whether the user's code was not compiled anew in the last such step
        self._known_callers: list[int] = []
        # Compiled modules that contain the model.
        self._wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def callers(self) -> list[nn.Module]:
        """The modules that the user may call, see `compiled_callers`; none where nothing is compiled."""
        if not compiler_is_loaded():
            return []
        found = compiled_callers(self.model, known=list(self._wrappers), search=not self.seen)
        self._wrappers.update(module for module in found if module is not self.model)
        self.seen = False
        return found

    def opens(self, callers: list[nn.Module], *, by_name: bool) -> bool:
        """Whether the step that begins is measured inside of the compiled code, which is open to it then.

        ``by_name``: whether what queries attend to is asked for by name, which compiled code does not show.
        Returns: False where forwards of ours have to show it; an error is reported where these cannot be made either.
        """
        in_graph = self._in_graph_of(callers)
        if by_name:
            in_graph.failed = "what queries attend to is asked for by name"
        exchanges = False  # whether one more forward would
        try:
            for caller in callers:
                require_no_exchange(caller)
        except CaptureError:
            exchanges = True
        if exchanges and in_graph.failed:
            more = (
                "(one more forward would exchange something with other processes; see docs/many_processes.md)"
            )
            self._report(CaptureError(f"{in_graph.failed} {more}"))
            return False
        if in_graph.failed or not (exchanges or (in_graph.plan is not None and self._settled)):
            return False
        in_graph.open()
        return True

    def close(self) -> None:
        """End the step."""
        if self.calls is not None:
            # Code that is compiled anew at each call runs uncompiled after some: another graph would delay that.
            self._settled = self.calls.is_settled and self.calls.num_measured > 0
            self.calls.remove()
            self.calls = None
        if self.in_graph is not None:
            self.in_graph.close()

    def adopt(self, observer: Observer, tape: Tape | None) -> None:
        """Take over what a first forward has found, and its trace where module calls tell all that is measured."""
        self._observer = observer
        if self.in_graph is not None:
            self.in_graph.observer = observer
            if tape is not None and not observer.structure.is_recorded:
                self.in_graph.learn(self.model, tape.graph, ())

    @property
    def open_graph(self) -> InGraph | None:
        """What measures the present step inside of compiled code; None for another step."""
        return self.in_graph if self.in_graph is not None and self.in_graph.is_open else None

    @property
    def points_outside(self) -> tuple[ShownTensor, ...] | None:
        """The states that modules outside of compiled code show; None where all are to be looked for."""
        open_graph = self.open_graph
        return None if open_graph is None or open_graph.plan is None else open_graph.plan.points

    @property
    def was_read(self) -> bool:
        """Whether the present step showed where compiled code makes what is measured."""
        return self.in_graph is not None and self.in_graph.reads

    def places(self, uncompiled: KnownPlaces | None) -> KnownPlaces | None:
        """Where later forwards make what is measured, given where those of the uncompiled model do."""
        return uncompiled if self.in_graph is None or self.in_graph.failed else self.in_graph

    def _in_graph_of(self, callers: list[nn.Module]) -> InGraph:
        if self.in_graph is None or [id(c) for c in callers] != self._known_callers:
            self._known_callers = [id(caller) for caller in callers]
            regions, reason = [], ""
            try:
                regions = regions_of(self.model, callers)
                # One process can read an uncompiled forward instead, and then trains bit for bit as without a recorder.
                if any(map(fuses, regions)) and not (dist.is_available() and dist.is_initialized()):
                    reason = "torch's compiler fuses otherwise around what is read, which rounds otherwise"
            except CaptureError as error:
                reason = str(error)
            self.in_graph = InGraph(self.model, regions, self._current, self._current.owner, self._report)
            self.in_graph.failed = reason
            self.in_graph.observer = self._observer
        return self.in_graph
