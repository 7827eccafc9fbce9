"""A probe that is on: it reads a model's residual states in the forwards and backwards that the user runs.

A `Session` tapes the first measured forward through hooks on every module and finds the structure of the model in it; from
then on only the modules that show a state, a branch or a connection have hooks. It never runs the model itself, and no hook
returns anything. Each thread has its own current forward.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from depthscope.diagnostics.schema import SUMS_OF_COEFFICIENTS
from depthscope.probes.model.arguments import is_decoding, named_arguments
from depthscope.probes.model.errors import CaptureError, as_capture_error
from depthscope.probes.model.garbage import no_collection
from depthscope.probes.model.hooks import (
    Attachment,
    CompilerLog,
    in_pipeline_inference,
    in_reentrant_checkpoint,
    num_running_calls,
)
from depthscope.probes.model.modules import module_paths
from depthscope.probes.model.sequence_shards import TokenShards, require_whole_sequences
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import in_transformation, unreadable_mode, user_wants_graph
from depthscope.probes.reading.places import KnownPlaces
from depthscope.probes.session.attention import (
    AttentionPlaces,
    attention_sums,
    measure_rows,
    placed_attention,
)
from depthscope.probes.session.backward_roots import StepLoss
from depthscope.probes.session.compiled_calls import CompiledCalls, compiled_callers, compiler_is_loaded
from depthscope.probes.session.compiled_regions import fuses, regions_of
from depthscope.probes.session.connection_parameters import ConnectionParameters
from depthscope.probes.session.find_structure import AxisError, StructureFinder
from depthscope.probes.session.first_forward import (
    NOT_READ,
    RecordedForward,
    RewrittenError,
    record_operations,
    replay,
)
from depthscope.probes.session.forward import CurrentForward, Forward, Measured, own_call, own_calls
from depthscope.probes.session.in_graph import InGraph
from depthscope.probes.session.later_forwards import LaterForwards
from depthscope.probes.session.logit_statistics import LOGIT_SUMS, LogitStatistics
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.options import Options
from depthscope.probes.session.own_forwards import require_no_exchange
from depthscope.probes.session.reservoir import Reservoir, training_stamp, weights_stamp
from depthscope.probes.session.routing import RoutingPlaces, placed_routing, routing_sums
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.structure.chain import ChainError
from depthscope.probes.structure.model_structure import FINAL, ShownTensor, Structure, require_same
from depthscope.probes.structure.tape import Tape

TRAINING = 2  # a call in training mode with a graph; 1 is one with a graph, 0 any other
ONE_MORE_FORWARD = (
    "(one more forward would exchange something with other processes; see docs/many_processes.md)"
)
MOST_ERRORS = 8  # of one step, whose first one is what is said


class Session:
    """The hooks of one probe on one model, and the forwards that they saw.

    Parameters
    ----------
    model : Module
        The user's model, which no hook changes.
    options : Options
        What to capture.
    loss_scale : callable, optional
        Gives the factor by which the loss is multiplied at present; None for 1.
    only_own : bool
        Whether only calls of the model inside of ``own_call(session.owner)`` are recorded, and not the user's.
    sums : bool
        Whether statistics of all tokens are added up, next to the sampled sequences.
    live_tokens : int
        How many tokens of a step are sampled for a live row; 0 for none.
    exact_sums : bool
        As `TokenSums.is_exact`.
    shards : TokenShards, optional
        How the tokens of a sequence are spread over processes that measure together; refused where they are and this is None.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        loss_scale: Callable[[], torch.Tensor | None] | None = None,
        *,
        only_own: bool = False,
        sums: bool = True,
        live_tokens: int = 0,
        exact_sums: bool = False,
        shards: TokenShards | None = None,
    ):
        self.model = model
        self.options = options
        self.owner = object()  # and not the session itself, which its own hooks would then keep alive
        # Of hooks, which must not raise in the user's forward or backward: raised at the end of a step.
        self.errors: list[Exception] = []
        self.forwards: list[Forward] = []  # that ended since the last fold
        self.last: Forward | None = None
        self.num_forwards = 0
        self.attention = AttentionPlaces()  # as the first forward shows
        self.routing = RoutingPlaces()  # as the first forward shows
        self._attention_is_known = True  # or the second one, where the first was counted along the wrong axis
        self.skipped = 0  # forwards of other threads during the first forward
        self.reservoir = self._new_reservoir()
        self._loss_scale = loss_scale
        self.step_loss = StepLoss(loss_scale, self.report)
        self._only_own = only_own
        self._sums = sums
        self.live_tokens = live_tokens
        self._exact_sums = exact_sums
        self.shards = shards
        self._observer: Observer | None = None  # from the end of the first forward on
        self._modules: frozenset[tuple[str, type]] = frozenset()  # of the model, when the observer was made
        self._first_batch_axis = 0  # of the model's first tensor, as the first forward assumes it
        self._measured: list[Measured] = []
        self._current = CurrentForward(self.owner)
        # Forwards of ours are changed on purpose, as in interventions: each is recorded in full.
        self._places = None if only_own else KnownPlaces()
        # Of states, with their children.
        self._containers: list[tuple[nn.Module, list[nn.Module | None]]] = []
        self._running: weakref.WeakSet[Forward] = weakref.WeakSet()  # in all threads
        self._lock = threading.RLock()  # guards all of the above against forwards of other threads
        self._searching = True  # for the structure, by hooks on every module
        self._first_thread: int | None = None  # that runs the first forward
        self._attachment: Attachment | None = None
        self._compiled: CompiledCalls | None = None
        self._in_graph: InGraph | None = None
        self._settled = False  # whether the user's code was not compiled anew in the last step that was measured uncompiled
        self._known_callers: list[int] = []
        # Compiled modules that contain the model.
        self._wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._unseen = True  # whether no call of the model was seen yet, or none in the step before
        self._compiler_met = 0  # how often torch's compiler had met our hooks when the step began
        self._num_without_graph = 0  # calls of the step that can have no gradient
        self._kind = 0  # of the calls of the step that count, see `_is_of_the_step`
        self._num_measured = 0  # of the forwards that `_measured` adds up
        self.num_left_out = 0  # evaluations within steps of training
        self.gradients_undefined = False  # of forwards since the last fold but one
        # Whether a forward whose connections cannot be read counts without them, and why some of the last fold's did.
        self.keeps_rest, self.without_connections = not only_own, ""

    def _new_reservoir(self) -> Reservoir:
        return Reservoir(self.options.max_sequences, self.options.seed, self.options.first_sequence)

    @property
    def observer(self) -> Observer:
        """What records the forwards; it knows the structure, and the precision of the states."""
        if self._observer is None:
            raise CaptureError(
                "the structure of the model is unknown before its first forward; call the model"
            )
        return self._observer

    @property
    def _is_recorded(self) -> bool:
        """Whether every measured forward is traced, since nothing else shows the weights of the connections."""
        return self._observer is not None and self._observer.structure.is_recorded

    @property
    def structure(self) -> Structure:
        """What the model was found to be in its first forward."""
        return self.observer.structure

    # --- hooks on, hooks off ---

    def attach(self) -> None:
        """Put the hooks on: on every module until the structure is known, then on those that show it.

        A compiled model gets none of these: see `compiled_calls`.
        """
        self.detach()
        self.step_loss.clear()
        self._num_without_graph, self._compiler_met = 0, CompilerLog.met
        self._kind = 0
        callers = self._compiled_callers()
        with self._lock:
            if not callers:
                self._attach()
                return
            in_graph = self._in_graph_of(callers)
            exchanges = _exchanges(callers)
            if exchanges and in_graph.failed:
                self.report(CaptureError(f"{in_graph.failed} {ONE_MORE_FORWARD}"))
                return
            if not in_graph.failed and (exchanges or (in_graph.plan is not None and self._settled)):
                in_graph.open()
                self._attach()
                return
            self._compiled = CompiledCalls(
                callers,
                self.owner,
                wanted=lambda: not self.errors and self._may_have_gradients(),
                run_hooked=self._run_hooked,
                gradients=self.options.gradients,
                listen=self.step_loss.listen,
                report=self.report,
            )
            self._compiled.attach()

    def _compiled_callers(self) -> list[nn.Module]:
        if self._only_own or not compiler_is_loaded():
            return []  # forwards of ours run uncompiled
        found = compiled_callers(self.model, known=list(self._wrappers), search=self._unseen)
        self._wrappers.update(module for module in found if module is not self.model)
        self._unseen = True  # until a call is seen
        return found

    def _in_graph_of(self, callers: list[nn.Module]) -> InGraph:
        """What measures the model inside of its compiled code."""
        if self._in_graph is None or [id(c) for c in callers] != self._known_callers:
            self._known_callers = [id(caller) for caller in callers]
            regions, reason = [], ""
            try:
                regions = regions_of(self.model, callers)
                # One process can read an uncompiled forward instead, and then trains bit for bit as without a recorder.
                if any(map(fuses, regions)) and not (dist.is_available() and dist.is_initialized()):
                    reason = "torch's compiler fuses otherwise around what is read, which rounds otherwise"
            except CaptureError as error:
                reason = str(error)
            self._in_graph = InGraph(self.model, regions, self._current, self.owner, self.report)
            self._in_graph.failed = reason
            self._in_graph.observer = self._observer
        if any("attention" in request.kinds for request in self.options.selection.requests):
            self._in_graph.failed = "what queries attend to is asked for by name"
        return self._in_graph

    def _run_hooked(self, function: Callable[[], Any]) -> tuple[Any, Forward | None]:
        """Call a function with the hooks on the model, as for a forward of ours of a compiled model."""
        before = self.last
        try:
            with self._lock:
                self._attach()
            result = function()
            if any(isinstance(error, RewrittenError) for error in self.errors):
                self.errors.clear()  # the second forward copies states as they pass
                result = function()
        finally:
            with self._lock:
                self._remove_hooks()
        return result, self.last if self.last is not before else None

    def _attach(self) -> None:
        self._first_thread = None
        if self._attachment is not None:
            self._attachment.remove()
        attachment = self._attachment = Attachment(self.report)
        # The model's own pre-hook goes first and its hook last, since the model itself may be a module that shows a state.
        attachment.before(self.model, self._begin)
        if (
            self._observer is None
            or not self._attention_is_known
            or self._modules != _module_types(self.model)
        ):
            # Also where modules came or went since: the structure is looked for again, and must be as it was.
            self._searching, self._containers = True, _containers(self.model)
            first = RecordedForward(
                self.model,
                self._current,
                gradients=self.options.gradients,
                report=self.report,
                attention=self._first_attention,
                routing=self._sums and self.shards is None,
            )
            first.attach(attachment)
        else:
            self._searching = False
            places = self._present_places
            is_placed = places is not None and places.places is not None
            hides = self._in_graph.hides if self._in_graph is not None and self._in_graph.is_open else None
            if self._is_recorded:
                # Its operations are traced, and, where they all are, its attention with them.
                RecordedForward(
                    self.model,
                    self._current,
                    gradients=False,
                    report=self.report,
                    observer=self._observer,
                    known=places,
                    attention=None if is_placed else self._later_attention,
                    routing=bool(self.routing.calls) and not is_placed,
                    hides=hides,
                ).attach(attachment)
            later = LaterForwards(
                self.model,
                self._observer,
                self._current,
                lambda: self.forwards,
                self.attention if is_placed or not self._is_recorded else None,
                self.routing if is_placed or not self._is_recorded else None,
                hides=hides,
                points=None if hides is None else self._points_outside,
            )
            later.attach(attachment)
            states = {of.point.path for of in self._observer.structure.shown}
            self._containers = _containers(self.model, states)
        attachment.after(self.model, self._end)
        # After `_end`, and also where the user's forward raised: what began has left, whether it ended well or not.
        attachment.after(self.model, self._leave, always=True)

    @property
    def _points_outside(self) -> tuple[ShownTensor, ...] | None:
        plan = None if self._in_graph is None else self._in_graph.plan
        return None if plan is None else plan.points

    @property
    def _present_places(self) -> KnownPlaces | None:
        return self._places if self._in_graph is None or self._in_graph.failed else self._in_graph

    @property
    def _first_attention(self) -> int | None:
        """Of how many sequences the first forward looks at what they attend to; None where it is not looked for."""
        # Where tokens are spread over processes, so are the heads.
        if not self.options.selection.includes("attention") or self.shards is not None:
            return None
        if not self._sums:
            return 0  # only where it lies
        # The whole sample in a capture; a loop first has to know what that costs.
        return self.options.max_sequences if self._only_own else 1

    @property
    def _later_attention(self) -> int | None:
        """The same of a later forward that is traced."""
        places = self.attention
        every = self.options.max_sequences if places.sequences is None else places.sequences
        return every if places.heads and every else None

    def _place_attention(self, tape: Tape, forward: Forward, structure: Structure) -> None:
        """Find out where the model attends, and how much of it is looked at from now on."""
        if (
            self._observer is None
        ) != self._attention_is_known:  # known already, or not to be seen in this forward
            return
        self._attention_is_known = True
        self.attention = placed_attention(tape, forward, structure)
        named = bool(self.options.selection.requests)
        if named:
            self.options.selection.require_attention(
                structure.chains, self.attention.heads, self.attention.reasons
            )
        elif not self._only_own:
            self.attention.limit_cost(structure, forward.batch_size)

    def _add_attention(self, forward: Forward) -> None:
        """Add what the queries of a forward attend to to the statistics."""
        measure_rows(forward)
        most = max(self.attention.heads.values(), default=0)
        for (number, depth), rows in forward.attention.items() if self._sums else ():
            mask = forward.masks.get(number)
            of_rows = None if mask is None else mask[forward.rows[: rows.shape[1]].to(mask.device)]
            forward.chain_sums(number).add_values(depth, attention_sums(rows, of_rows, most))

    def _add_routing(self, forward: Forward) -> None:
        """Add what the routers of a forward chose to the statistics, where they chose as often as in the first one."""
        routed, forward.routed = forward.routed, {}
        if forward.unrouted or not routed:
            return
        most = max(sum(of.experts for of in each) for each in routed.values())
        for (number, depth), each in routed.items():
            sums = routing_sums(each, forward.masks.get(number), forward.batch_axis, most)
            forward.chain_sums(number).add_values(depth, sums)

    def detach(self) -> int:
        """Take every hook off; gradient hooks stay on the tensors of ended forwards, until these are folded or dropped.

        Returns: How many forwards had not ended, and are forgotten.
        """
        # One that was stopped, as by a key, did not leave; those of other threads are taken to run.
        if self._current.recorded is not None and not num_running_calls(self.model):
            self.forget_running()
        with self._lock:
            if self._compiled is not None:
                # Code that is compiled anew at each call runs uncompiled after some: another graph would delay that.
                self._settled = self._compiled.is_settled and self._compiled.num_measured > 0
                self._compiled.remove()
                self._compiled = None
            self._remove_hooks()
            if self._in_graph is not None:
                self._in_graph.close()
            self._first_thread = None
            cut_short = [forward for forward in self._running if not forward.cancelled]
            for forward in cut_short:
                forward.cancelled = True
                forward.release()
            self._running.clear()
        self._current.clear()
        return len(cut_short)

    def _remove_hooks(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def after_fork(self) -> None:
        """Forget the probe in a child process, which is a copy of the parent in the middle of anything."""
        self._lock = threading.RLock()  # a thread that does not exist here may hold the old one
        self.detach()
        self.drop()

    def report(self, error: Exception) -> None:
        """Note what a hook met; the first error of a step is enough to leave the step out."""
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)

    # --- one forward ---

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._current
        if current.hidden or (self._only_own and own_calls.owner is not self.owner):
            return
        if current.recorded is not None and num_running_calls(self.model) > 1:
            current.recorded.nested += 1  # the model calls itself: part of the forward that is running
            return
        if (current.is_running and in_transformation()) or in_pipeline_inference():
            return  # part of it as well, whose tensors nobody can read; or no part of the training
        current.clear()
        self._unseen = False
        # No part of a step that will be left out, and no forward without gradients of a step that measures these.
        if self.errors or not self._may_have_gradients() or not self._is_of_the_step(module):
            return
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim > 0]
        if tensors and not any(tensor.numel() for tensor in tensors):
            return  # an empty batch adds nothing, and shows no structure
        lead = _readable(tensors[0] if tensors else None)
        named = named_arguments(module, args, kwargs)
        with self._lock:
            if self._attachment is None or not self._is_first_thread():
                return
            self._require_same_modules()
            require_whole_sequences(module, hooks=self._searching, known=self.shards)
            self._attachment.run_last()
            forward = current.forward = self._new_forward(module, lead, named)
            self._running.add(forward)
            if self._searching or self._is_recorded:
                current.tape = Tape()

    def _may_have_gradients(self) -> bool:
        """Whether a call that begins can have gradients, where these are wanted: a validation under ``no_grad`` has none.

        It is no forward of the training that the step measures, so it counts nowhere.
        """
        if not self.options.gradients or user_wants_graph() or in_reentrant_checkpoint():
            return True
        self._unseen = False
        self._num_without_graph += 1
        return False

    def _is_of_the_step(self, model: nn.Module) -> bool:
        """Whether a call that begins is one of those that the step measures: evaluations do not mix with training.

        Of the calls of a step count those that come closest to training: in training mode with a graph, else with a graph,
        else all. A loop that only evaluates is measured as a whole; an evaluation within a step of training is not.
        """
        if self._only_own:
            return True
        has_graph = user_wants_graph() or in_reentrant_checkpoint()
        kind = has_graph + (has_graph and model.training)
        with self._lock:
            if kind < self._kind:
                self.num_left_out += 1
                return False
            if kind > self._kind:
                self._leave_out_so_far()
                self._kind = kind
        return True

    def _leave_out_so_far(self) -> None:
        """Forget the forwards of the step that have ended: they turned out to be evaluations."""
        seen = len(self.forwards) + self._num_measured
        if not seen:
            return
        self.num_left_out += seen
        for forward in self.forwards:
            forward.release()
        self.forwards, self._measured, self._num_measured = [], [], 0
        self.reservoir.forget()

    def _require_same_modules(self) -> None:
        """Require that no layer came, went or was replaced since the hooks were put on: a new one has none."""
        for module, children in self._containers:
            if [*module._modules.values()] != children:  # modules are equal where they are one object
                raise CaptureError(
                    f"layers of {type(module).__name__} came, went or were replaced within the step; change a model between "
                    "two steps, before recorder.step()"
                )

    def _is_first_thread(self) -> bool:
        """Whether this thread's forward may be taped: one tape at a time, since its hooks are replaced at its end."""
        if not self._searching:
            return True
        this = threading.get_ident()
        if self._first_thread not in (None, this):
            self.skipped += 1
            return False
        self._first_thread = this
        return True

    def _new_forward(self, model: nn.Module, lead: torch.Tensor, named: dict[str, Any]) -> Forward:
        if not (self.forwards or self._measured or self._running):
            self.reservoir.restart_empty()
        # Sums and samples of an evaluation and of a training with the same weights do not mix, also in different steps.
        stamp = weights_stamp(model)
        if self._kind == TRAINING:
            stamp = training_stamp(stamp)
        batch_axis = self._first_batch_axis if self._observer is None else self.structure.batch_axis
        if self.options.is_packed:
            lead, batch_axis = lead.unsqueeze(0), 0
        forward = Forward(
            **self._drawn(lead, batch_axis, stamp),
            stamp=stamp,
            arguments=named,
            decoding=is_decoding(named),
            lead_shape=tuple(lead.shape),
        )
        forward.lead = lead if self._observer is None else None
        return forward

    def _drawn(self, lead: torch.Tensor, batch_axis: int, stamp: int) -> dict[str, Any]:
        """The sequences of a forward that are sampled."""
        batch_size = lead.shape[batch_axis]
        slots = self.reservoir.choose(batch_size, stamp)
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        return {
            "batch_size": batch_size,
            "batch_axis": batch_axis,
            "first_index": self.reservoir.first + self.reservoir.total - batch_size,
            "slots": slots,
            "rows": rows,
            "row_data": lead.detach().movedim(batch_axis, 0)[rows].clone(),
        }

    def _count_along_other_axis(self, tape: Tape, forward: Forward) -> None:
        """Draw the sequences of the first forward again: they are along the second axis of what the model was called with."""
        assert forward.lead is not None
        self.reservoir = self._new_reservoir()
        for name, value in self._drawn(forward.lead, 1, forward.stamp).items():
            setattr(forward, name, value)
        # What its tokens attend to was looked at for the wrong sequences: the next forward shows it.
        tape.attention, forward.attention = None, {}
        self._attention_is_known = self._first_attention is None

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = self._current
        forward, tape = current.recorded, current.taped
        if forward is None or forward.nested:
            return
        current.forward = current.tape = None
        self._running.discard(forward)
        if self.errors:  # something of this forward, or of another one of the step, is missing
            forward.release()
            return
        try:
            self._require_same_modules()
            if tape is not None and self._searching:
                self._end_first(tape, forward)
            elif tape is not None:
                self._end_traced(tape, forward)
            self._add_attention(forward)
            self._add_routing(forward)
            self.step_loss.listen(output)
            for sums in forward.sums:
                sums.end_forward()
            forward.end()
            self._require_complete(forward)
        except BaseException:
            forward.release()
            raise
        with self._lock:
            self.forwards.append(forward)
            self.last = forward
            if not self.options.gradients:
                self._absorb()  # no backward will add to it, so a loop that never steps stores one forward at most

    def _end_traced(self, tape: Tape, forward: Forward) -> None:
        """Record what the trace of a later forward shows."""
        try:
            with own_call(self.observer):
                record_operations(tape, forward, self.observer, self.model, self._present_places)
        except NOT_READ as error:
            # The sample of a run has connections, which an earlier forward has to give then.
            if not self.keeps_rest or not (self.reservoir.stored or self.forwards or self._measured):
                raise
            forward.without_connections = str(error)
        placed_routing(tape, forward, self.structure)
        if tape.attention is not None:
            self.attention.seen.update(placed_attention(tape, forward, self.structure).heads.keys())

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note that a call of the model is over; where it did not reach `_end`, it raised."""
        forward = self._current.recorded
        if forward is None:
            return
        if forward.nested:
            forward.nested -= 1
            return
        self._running.discard(forward)
        self._current.clear()

    def _end_first(self, tape: Tape, forward: Forward) -> None:
        """Find the structure in a forward, and record what that forward showed of it."""
        try:
            with no_collection():
                structure = self._found_structure(tape, forward)
            if self._observer is not None:
                require_same(structure, self._observer.structure)
            # Before the states: where these have to be copied in one more forward, it is not traced again.
            self._place_attention(tape, forward, structure)
            self.routing = placed_routing(tape, forward, structure)
            # A capture follows a forward for the logits; of its one set of weights no value moves.
            loops = self._sums and not self._only_own and bool(structure.sites)
            observer = Observer(
                structure,
                self.options,
                self.report,
                self._loss_scale,
                calls=Counter(call.path for call in tape.graph.calls),
                sums=self._sums,
                parameters=ConnectionParameters(self.model, structure) if loops else None,
                logits=LogitStatistics(self.options.gradients, self.report, self._loss_scale)
                if loops
                else None,
                live_tokens=self.live_tokens,
                exact_sums=self._exact_sums,
                compiled_sums=self._sums and not self._only_own,
            )
            try:
                with own_call(observer):  # what it runs once more is nobody's forward
                    replay(tape, forward, observer)
            except RewrittenError:
                self._adopt(observer)  # the structure is right: later forwards copy states as they pass
                if not (self.num_forwards or self.forwards or self._measured):
                    # Nothing of this forward counts, and its sequences come again.
                    self.reservoir = self._new_reservoir()
                raise
            self._adopt(observer, tape)
        except ChainError as error:
            reason = _out_of_sight(self.model, forward)
            raise ChainError(f"{reason}; {error}") if reason else error from None
        except AxisError:
            self._first_batch_axis = 1
            self.reservoir = self._new_reservoir()  # tokens were drawn
            raise
        finally:
            with self._lock:
                if self._only_own:  # whoever calls the model puts the hooks on again before another call
                    self._remove_hooks()
                elif self._attachment is not None:
                    self._attach()  # with the hooks of the structure, or for another first forward

    def _found_structure(self, tape: Tape, forward: Forward) -> Structure:
        if tape.recorder is None:
            raise CaptureError("the model's own forward did not run")
        finder = StructureFinder(tape.graph, self.model, self.options, forward.batch_size, forward.batch_axis)
        try:
            return finder.structure(self.shards)
        except AxisError:
            # A forward of ours runs once more. The user's does not: its step would be lost.
            if own_calls.owner is not None:
                raise
            self._count_along_other_axis(tape, forward)
            return finder.along(1, forward.batch_size).structure(self.shards)

    def _adopt(self, observer: Observer, tape: Tape | None = None) -> None:
        if self._places is not None:
            self._places.forget()
        self._observer, self._modules = observer, _module_types(self.model)
        if self._in_graph is not None:
            self._in_graph.observer = observer
            if tape is not None and not observer.structure.is_recorded:  # its module calls tell all
                self._in_graph.learn(self.model, tape.graph, ())

    # --- the end of a step ---

    def raise_first_error(self) -> None:
        """Raise the first error that a hook met, and forget the others: most follow from it."""
        errors, self.errors[:] = list(self.errors), []
        if errors:
            raise as_capture_error(errors[0])

    def fold(self) -> list[Measured]:
        """What the forwards since the last fold add up to; their sampled sequences go to the reservoir.

        Returns: One for each change of the weights, mostly one.
        Raises CaptureError: Where a state or connection did not show, or no gradient arrived; none of these forwards
        counts then.
        """
        with self._lock:
            self.gradients_undefined = any(forward.gradients_undefined for forward in self.forwards)
            self._absorb()
            done, self._measured, self._num_measured = self._measured, [], 0
            self.without_connections = next(filter(None, (each.without_connections for each in done)), "")
            for each in done if self.without_connections else ():
                _forget_connections(each.sums)
            if self.without_connections and not self.reservoir.stored:
                raise CaptureError(self.without_connections)
            self.step_loss.clear()
        if not done:
            raise CaptureError(self._why_nothing())
        return done

    def _why_nothing(self) -> str:
        if self._num_without_graph:
            return (
                "gradients were asked for but none arrived: every forward of the step ran without a graph, as under "
                "torch.no_grad(); such forwards count to no step that measures gradients"
            )
        if self._compiler_met != CompilerLog.met:
            return (
                "the model was only called inside of code that was compiled, traced or exported as a whole; record the module "
                "that torch.compile returned, or compile the model and not the function around it"
            )
        if self._only_own:
            return (
                "no forward of the model was seen: the batch is empty, or the model is not called through Module.__call__, "
                "which runs the hooks; nothing to measure"
            )
        hint = ", or only inside of compiled code" if compiler_is_loaded() else ""
        return f"the model was not called between two steps, or with empty batches only{hint}; nothing to measure"

    @property
    def pending(self) -> bool:
        """Whether forwards ended, or errors came, since the last fold."""
        return bool(self.forwards or self._measured or self.errors)

    @property
    def trains(self) -> bool:
        """Whether the forwards of the step that count are those of a training."""
        return self._kind == TRAINING

    @property
    def present_stamp(self) -> int:
        """The stamp of forwards with the present weights, of the kind that the step counts."""
        stamp = weights_stamp(self.model)
        return training_stamp(stamp) if self.trains else stamp

    def forget_running(self) -> None:
        """Forget the forward that this thread was running when something stopped it."""
        self._current.clear()

    def drop(self) -> None:
        """Forget the forwards since the last fold, and the one that this thread is running."""
        self.forget_running()
        for forward in self.forwards:
            forward.release()
        self.forwards, self._measured, self._num_measured = [], [], 0
        self.errors.clear()
        self.step_loss.clear()

    def _absorb(self) -> None:
        done, self.forwards = self.forwards, []
        counted = self._with_gradients(done)
        try:
            for forward in counted:  # all are checked before any is counted
                self._require_gradients(forward)
        finally:
            for forward in done:
                forward.release()
        for forward in counted:
            self.num_forwards += 1
            self._num_measured += 1
            if not forward.without_connections:
                self.reservoir.store(forward.sequences(), forward.stamp)
            if not self._measured or self._measured[-1].stamp != forward.stamp:
                self._measured.append(Measured(forward.stamp, 0, []))
            self._measured[-1].add(forward)

    def _with_gradients(self, done: list[Forward]) -> list[Forward]:
        """The forwards that a backward followed, where there is one: others of the step were looked at and not trained on."""
        if not self.options.gradients or self._only_own:
            return done
        trained = [forward for forward in done if forward.arrivals]
        # The sample was drawn from all of them: where it has none of those with gradients, the step is not measured.
        if not any(forward.slots for forward in trained):
            return done
        self.num_left_out += len(done) - len(trained)
        return trained

    def _require_complete(self, forward: Forward) -> None:
        missing = [
            f"{self.structure.chains[number].name or 'depth'} {'final' if depth == FINAL else depth}: "
            f"{point.at} of {point.path or 'the model'}"
            for number, depth, point in self.structure.captured
            if ("state", number, depth) not in forward.fired
        ]
        missing += [
            f"connection {number}: {connection.path}"
            for number, connection in enumerate(self.structure.connections)
            if ("connection", 0, number) not in forward.fired and not forward.without_connections
        ]
        if missing:
            raise CaptureError(
                f"{len(missing)} requested places did not fire in a forward: {', '.join(missing[:5])}. "
                "A compiled model skips hooks (capture before compiling), and a skipped layer has no state"
            )
        self.observer.require_usual_calls(forward)

    def _require_gradients(self, forward: Forward) -> None:
        missing = {key[:2] for key in forward.expected_gradients} - forward.arrivals.keys()
        if self._in_graph is not None and self._in_graph.reads and self.options.gradients and missing:
            raise CaptureError(
                "it showed where compiled code makes what is measured, and has no gradients; the next ones are measured"
            )
        if self.options.gradients and not forward.arrivals:
            if self._only_own:
                raise CaptureError(
                    "no gradient of the loss arrives at any state: the graph is cut between the last block and the loss; look "
                    "for a detach, a no_grad or an argmax there"
                )
            raise CaptureError(
                "gradients were asked for but none arrived: call loss.backward() between the forward and step(), "
                "with gradients enabled in the forward"
            )


def _forget_connections(sums: Iterable[TokenSums]) -> None:
    """Drop what forwards of a step show of connections, where others of it do not: no mean over the step's tokens is known."""
    for chain in sums:
        chain.forget("gain_sum", "gain_max", *LOGIT_SUMS, "logit_range_max", *SUMS_OF_COEFFICIENTS)
        if chain.live is not None:
            chain.live.forget_connections()


def _exchanges(callers: list[nn.Module]) -> bool:
    """Whether one more forward of a model would exchange something with other processes."""
    try:
        for caller in callers:
            require_no_exchange(caller)
    except CaptureError:
        return True
    return False


def _out_of_sight(model: nn.Module, forward: Forward) -> str:
    """Why the parts of a model ran where no hook sees them; empty where they did not."""
    if forward.transformed:
        return (
            "modules of the model ran inside of a transformation of torch.func (vmap, grad, …), whose tensors stand for "
            "others and are not read"
        )
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is TorchScript, whose parts run outside of Python: capture the module that it was made from"
    if isinstance(model, torch.fx.GraphModule) and not any(True for _ in model.children()):
        return "the model is a graph of operations, as torch.export makes: capture the module that it was made from"
    return ""


def _readable(lead: torch.Tensor | None) -> torch.Tensor:
    """The first tensor that the model was called with, where its values can be read."""
    if lead is None:
        raise CaptureError("the model was called without a tensor; expected a batch of tensors")
    mode = unreadable_mode(lead)
    if mode is not None:
        raise CaptureError(f"the model was called {mode}; expected a plain call")
    return lead


def _module_types(model: nn.Module) -> frozenset[tuple[str, type]]:
    """Which modules a model has: what changes where layers are added, dropped, wrapped or parametrised."""
    return frozenset([(path, type(module)) for path, module in module_paths(model, shared=True)])


def _containers(
    model: nn.Module, paths: Iterable[str] | None = None
) -> list[tuple[nn.Module, list[nn.Module | None]]]:
    """The modules that contain some others, or all, each with its children."""
    modules = dict(module_paths(model, shared=True))
    if paths is None:
        return [(module, [*module._modules.values()]) for path, module in modules.items() if module._modules]
    above = {path.rpartition(".")[0] for path in paths}
    above |= {path[: dot.start()] for path in above for dot in re.finditer(r"\.", path)} | {""}
    return [(modules[path], [*modules[path]._modules.values()]) for path in sorted(above)]
