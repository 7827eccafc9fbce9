"""The first forward: hooks on every module, and the structure of the model found in what they taped.

Hooks on every module tape all calls. When the forward has ended, `find_structure` finds the chains on the tape, and `replay`
hands the observer what the tape stored of the states, so that the first forward is measured like every later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import DepthWeights
from depthscope.probes.connections.detection import opened_site, paired_family
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.families.traced import read_traced
from depthscope.probes.connections.family import ForwardFamily, Site, StreamConnectionError
from depthscope.probes.connections.reading import Opening, branch_output, returned_watch
from depthscope.probes.dataflow.axes import is_packed, layout_of
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, MethodWatch, Modes, Report
from depthscope.probes.model.layout import LayoutError, canonical
from depthscope.probes.model.modules import module_paths
from depthscope.probes.model.preserved_state import preserved_state, unhooked_twin
from depthscope.probes.model.sequence_shards import TokenShards
from depthscope.probes.model.tensors import first_float, floats_in, tensors_in, version
from depthscope.probes.model.user_modes import outside_user_modes, under_function_modes, user_autocast
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import PARAMETER, TracedValue, ValuePlace
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.attention import watch_attention
from depthscope.probes.session.forward import CurrentForward, Forward
from depthscope.probes.session.gradient_hooks import GradientListener
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.options import Options
from depthscope.probes.structure.branch_scales import branch_scales
from depthscope.probes.structure.chain import Chain, Connection, HookPoint
from depthscope.probes.structure.depth_reads import find_depth_reads, read_weights
from depthscope.probes.structure.infer_layout import infer_layout, takes_tokens_first
from depthscope.probes.structure.inner_streams import inner_streams
from depthscope.probes.structure.layout_changes import split_at_layout_changes
from depthscope.probes.structure.layout_evidence import read_evidence
from depthscope.probes.structure.model_structure import CapturedState, Structure
from depthscope.probes.structure.not_covered import not_covered
from depthscope.probes.structure.plain_proof import PROVEN, states_of
from depthscope.probes.structure.proven_chains import FoundChains, proven_chains
from depthscope.probes.structure.stream_count import require_count, with_asserted_streams
from depthscope.probes.structure.tape import FORWARD, Call, Tape
from depthscope.probes.structure.traced_streams import traced_connection


class RewrittenError(CaptureError):
    """A state of the first forward was rewritten in place before it could be copied."""


class AxisError(RewrittenError):
    """The sequences of the first forward were counted along the wrong axis."""


class FirstForward:
    """Hooks on every module that tape its calls.

    Parameters
    ----------
    model : Module
        The user's model.
    current : CurrentForward
        The running forward.
    gradients : bool
        Whether gradients are wanted.
    report : callable
        Called with every exception that a gradient hook raises.
    observer : Observer, optional
        Of a known structure that only the trace of a forward shows: it gets the states that no module shows.
    attention : int, optional
        Of how many of the sampled sequences it is looked at what their tokens attend to; None where it is not looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        current: CurrentForward,
        *,
        gradients: bool,
        report: Report,
        observer: Observer | None = None,
        attention: int | None = None,
    ):
        self._observer, self._attention = observer, attention
        captured = observer.structure.captured if observer is not None else ()
        self._operations = {
            ValuePlace(p.path, p.index, p.operation, p.item, p.result): state
            for state in captured
            if (p := state.point).at == "operation"
        }
        self._model = model
        self._paths: dict[int, str] = {}  # of all modules, by identity
        self._current = current
        self._gradients = gradients
        self._report = report

    def attach(self, attachment: Attachment) -> None:
        """Put hooks on every module, and around the methods of those that may be paired connections."""
        for path, module in module_paths(self._model):
            self._paths[id(module)] = path
            attachment.before(module, self._before_call, computes=False)
            attachment.after(module, self._after_call, computes=False)
            if module is self._model:
                # Around the forward method, not a hook: the trace must be on while it runs, and only then.
                attachment.around(module, FORWARD, self._around_forward)
            pair = paired_family(module)
            if pair is not None:  # torch calls hooks around a module's forward only, not around other methods
                attachment.around(module, pair.opens, partial(self._around_opening, path))
                attachment.around(module, pair.closes, partial(self._around_closing, path, pair.closes))

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tape = self._current.taped
        if tape is None:
            self._current.note_transformation()
            return
        if tape.trace is not None:
            tape.trace.watch_again()
        path = self._paths[id(module)]
        call = tape.enter(path, module, args, kwargs)
        if tape.recorder is None and module is self._model:
            tape.recorder = self._new_recorder(tape, args, kwargs)
        if tape.recorder is not None:
            call.taken = tape.recorder.enter(path, type(module).__name__, floats_in(args, kwargs))
        if tape.trace is not None and len(args) + len(kwargs) == 1 and not under_function_modes():
            tape.trace.step_aside(module, call.x, call.values[0])

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tape = self._current.taped
        if tape is not None:
            if tape.trace is not None:
                tape.trace.watch_again(module, output)
            # Only this computes: whether several outputs are a connection's, and how a block adds its branches.
            computes = tape.searches_blocks or isinstance(output, (tuple, list, dict))
            with outside_user_modes() if computes else nullcontext():
                call = tape.leave(module, output)
            if tape.recorder is not None:
                call.given = tape.recorder.leave(call.path, output, floats_in(output))

    def _new_recorder(self, tape: Tape, args: Any, kwargs: Any) -> GraphRecorder:
        """What records the values of a forward that begins."""
        recorder = GraphRecorder(self._model, list(tensors_in((args, kwargs))))
        forward = self._current.recorded
        assert forward is not None
        recorder.on_taken = partial(self._meet, forward, tape)
        if self._operations:
            recorder.on_value = partial(self._record_operation, forward, tape)
        return recorder

    def _around_forward(self, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        tape = self._current.taped
        if tape is None or tape.trace is not None:  # the model may call itself
            return None
        trace = tape.trace = Trace()
        forward = self._current.recorded
        assert forward is not None
        for tensor in tensors_in((args, kwargs)):
            batched = (
                tensor.ndim > forward.batch_axis and tensor.shape[forward.batch_axis] == forward.batch_size
            )
            trace.watch(tensor, forward.batch_axis if batched else None)
        recorder = tape.recorder
        assert recorder is not None
        if self._attention is not None:
            rows = forward.rows[: self._attention]
            tape.attention = watch_attention(recorder, self._model, forward, rows)
        if self._observer is not None and self._observer.logits is not None:
            tape.logits = self._observer.matrices(recorder.graph)
        # The trace on top of it: what the recorder copies for itself is no operation of the model's.
        return MethodWatch(Modes(recorder, trace), recorder.end)

    def _meet(self, forward: Forward, tape: Tape, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a value that is taken: the tensor has its graph by now."""
        if not value.is_floating or tensor.ndim < 2 or forward.cancelled:
            return
        if tape.logits is not None:
            tape.logits.take(value, tensor)
        if value.number not in tape.met:
            tape.met.add(value.number)
            if tape.trace is not None and (twin := tape.trace.value(tensor)) is not None:
                tape.twins[value.number] = twin
            state = self._record_operation(forward, tape, value, tensor)
            if state is not None and self._observer is not None:
                self._observer.hook_gradient(forward, state.chain, state.depth, tensor)
        # Inside of a function of autograd, as a reentrant checkpoint is, it has no graph yet; what the function gives has one.
        listens = self._gradients and tensor.requires_grad and (tensor.is_leaf or tensor.grad_fn is not None)
        if listens and value.number not in forward.listeners and value.kind != PARAMETER:
            forward.listeners[value.number] = GradientListener(tensor, self._report)

    def _record_operation(
        self, forward: Forward, tape: Tape, value: TracedValue, tensor: torch.Tensor
    ) -> CapturedState | None:
        """Record a state when the operation that makes it has run, or a part of it was written."""
        if not self._operations or tape.recorder is None:
            return None
        state = self._operations.get(tape.recorder.graph.place(value))
        if state is None or self._observer is None:
            return None
        if ("state", state.chain, state.depth) not in forward.fired:
            self._observer.record_state(forward, state.chain, state.depth, tensor)
        return state

    def _around_opening(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        tape, forward = self._current.taped, self._current.recorded
        x, pair = first_float(args, kwargs), paired_family(module)
        if tape is None or forward is None or x is None or pair is None:
            return None
        site = opened_site(pair, module, x, forward.batch_size)
        if site is None:
            return None
        opening = Opening(site, forward.batch_size, x.detach())
        opening.key = tape.opened(path, module, pair.opens, x, site)
        opening.key.taken = self._recorded(tape, x)
        forward.openings.setdefault(_taped(path), []).append(opening)
        watch = opening.watch()

        def done(result: Any) -> None:
            try:
                opening.read(result, watch)
            except StreamConnectionError as error:
                # What it computes is not what it applies: the operations themselves may still tell what that is.
                tape.unreadable = tape.unreadable or error
                forward.openings[_taped(path)].remove(opening)

        return MethodWatch(watch, done)

    def _around_closing(
        self, path: str, method: str, module: nn.Module, args: Any, kwargs: Any
    ) -> MethodWatch | None:
        tape, forward = self._current.taped, self._current.recorded
        if tape is None or forward is None or not forward.openings.get(_taped(path)):
            return None
        # A shared connection may be opened again before it is closed: the last opening is closed first.
        opening, branch_out = forward.openings[_taped(path)].pop(), branch_output(module, args, kwargs)
        watch = opening.closing_watch(branch_out)

        def done(result: Any) -> None:
            output = first_float(result)
            if output is not None:
                parts = opening.close(branch_out, result, watch)
                closed = tape.closed(opening.key, method, branch_out, output, parts)
                closed.given = self._recorded(tape, output)

        return MethodWatch(watch or nullcontext(), done)

    def _recorded(self, tape: Tape, tensor: torch.Tensor | None) -> list[int]:
        """The number of a tensor's value in the recorded graph, which is listened to from now on."""
        if tape.recorder is None or tensor is None:
            return []
        return [tape.recorder.value_of(tensor).number]


def _taped(path: str) -> str:
    """The key of a connection's openings on the tape: in a traced forward the hooks of `LaterForwards` note their own."""
    return f"{path} on the tape"


# --- what the model is ---


def find_structure(
    tape: Tape, forward: Forward, model: nn.Module, options: Options, shards: TokenShards | None = None
) -> Structure:
    """Find the structure of a model in the calls of one forward.

    ``options``: what the user names of the structure, and asks for.
    ``shards``: how the tokens of a sequence are spread over processes that measure together.
    Raises AxisError: Where the sequences of the forward should have been counted along the other axis.
    Raises ChainError, LayoutError, SiteError: Where the model cannot be read, or lacks a requested site.
    """
    found = _readable_chains(tape, model, options, forward.batch_size)
    chains, sites = found.chains, found.traced or _stream_sites(tape, found.chains[0])
    if options.layout is None:
        chains = tuple([part for chain in chains for part in split_at_layout_changes(tape, chain)])
    layouts = tuple(_layout(tape, chain, forward, sites, options) for chain in chains)
    named_streams = require_count(chains[0], layouts[0], sites, forward.batch_size, options.streams)
    if not sites:  # a known connection tells its own layout
        for chain, layout in zip(chains, layouts, strict=True):
            _require_all_sequences(chain.shapes[0], layout, forward.batch_size, named_streams)
        chains = tuple(with_asserted_streams(chain, named_streams) for chain in chains)
    chains = tuple([replace(chain, scales=branch_scales(tape, chain, model)) for chain in chains])
    options.selection.require(chains)  # only now is it known which sites the model has
    if shards is not None:
        _require_plain_tokens(chains, layouts, sites)
    return Structure(
        chains=chains,
        layouts=layouts,
        sites=sites,
        named_streams=named_streams,
        batch_axis=forward.batch_axis,
        selection=options.selection,
        inner_streams=found.inner_streams
        if sites or chains[0].proof == PROVEN
        else inner_streams(states_of(tape, chains[0].points)),
        not_covered=not_covered(tape, model, chains, named=options.blocks is not None),
        shards=shards,
        read=found.read,
    )


def _require_plain_tokens(
    chains: tuple[Chain, ...], layouts: tuple[str, ...], sites: Mapping[int, Site]
) -> None:
    """Require a model of which parts of sequences can be measured: one stream, and one axis of tokens."""
    for chain, layout in zip(chains, layouts, strict=True):
        if sites or chain.over_depth or chain.history:
            raise CaptureError(
                "the tokens of each sequence are spread over processes, and the model mixes streams or depths; expected one "
                "stream that branches are added to. Record it without sequence parallelism"
            )
        if "T" not in layout.split():
            raise CaptureError(
                f"the tokens of each sequence are spread over processes, and the states have the layout {layout!r}; expected "
                "one axis of tokens. Record it without sequence parallelism"
            )


def _require_all_sequences(shape: tuple[int, ...], layout: str, batch_size: int, num_streams: int) -> None:
    """Require that a layout finds as many sequences in a state as the model was called with."""
    state = torch.empty(shape, device="meta")
    found = canonical(state, layout, batch_size=batch_size, num_streams=num_streams).shape[0]
    if found != batch_size:
        raise LayoutError(
            f"layout {layout!r} finds {found} sequences in a state of shape {shape}, and the model was called with "
            f"{batch_size}; expected the axis of the model's sequences as B. Call the model with one sequence in each row of "
            "the batch"
        )


def _readable_chains(tape: Tape, model: nn.Module, options: Options, batch_size: int) -> FoundChains:
    """The chains of a model; where a known connection computes other weights than it applies, from its operations."""
    if tape.unreadable is None:
        inside = options.selection.inside_blocks
        return proven_chains(tape, model, layers=options.blocks, batch_size=batch_size, inside=inside)
    for call in tape.calls:
        call.site = None
    try:
        found = proven_chains(tape, model, layers=options.blocks, batch_size=batch_size)
    except ValueError:
        raise tape.unreadable from None
    if not found.traced:
        raise tape.unreadable
    return found


def _stream_sites(tape: Tape, chain: Chain) -> dict[int, Site]:
    """What the calls of a chain's connections showed themselves to be, by the number of the connection."""
    if not chain.has_streams:
        return {}
    shown = {(call.path, call.index): call.site for call in tape.calls if call.site is not None}
    numbered = enumerate((c.path, c.index) for c in chain.connections)
    return {number: shown[key] for number, key in numbered if key in shown}


def _layout(tape: Tape, chain: Chain, forward: Forward, sites: Mapping[int, Site], options: Options) -> str:
    if options.layout is not None:
        return options.layout
    if sites:
        return sites[0].layout  # a connection was detected by its layout; a plain state shows none
    evidence = read_evidence(tape, chain)
    if forward.batch_axis == 0 and takes_tokens_first(chain.shapes[0], forward.lead_shape, evidence):
        raise AxisError(
            "the model takes its tokens first, so the batch is its second axis; call the model once more"
        )
    shown = layout_by_operations(tape, chain)
    # Where streams are made and merged inside each step, it is none of a plain chain, and its axes are known all the same.
    if shown is not None and (chain.proof == PROVEN or inner_streams(states_of(tape, chain.points))):
        return shown
    # Streams may hide in the axes of a state that is not proven: its shape is asked first, and what was done along its axes
    # has the last word.
    inferred = infer_layout(chain.shapes[0], batch_size=forward.batch_size, evidence=evidence)
    return shown or inferred


def layout_by_operations(tape: Tape, chain: Chain) -> str | None:
    """The layout of a plain chain by what was done along the axes of its first state; None where that does not tell."""
    states = states_of(tape, chain.points)
    if states[0] is not None and is_packed(states[0].axes):
        raise LayoutError(
            f"the state of shape {states[0].shape} has its tokens along the axis that the model's first tensor has its "
            "sequences along: several sequences are packed into one, which cannot be told apart here. Call the model with one "
            "sequence in each row of the batch, padded where they differ in length"
        )
    return None if states[0] is None else layout_of(states[0].axes, None)


# --- what the first forward showed ---


def replay(tape: Tape, forward: Forward, observer: Observer) -> None:
    """Hand what the tape stored to the observer, as the hooks of later forwards do."""
    structure = observer.structure
    if structure.traced and structure.read is None:
        # Which of its tensors are needed is known only now, and most are gone.
        raise RewrittenError(
            "the states and weights of this model's connections are local variables; call the model once more: from the "
            "second forward on they are read where they are computed"
        )
    calls = tape.by_key()
    for number, depth, point in structure.captured:
        value, tensor = _first_value(tape, point)
        listener = None if value is None else forward.listeners.get(value.number)
        if listener is not None:
            # The value has a hook since it was met; from now on the hook knows which state it belongs to.
            observer.expect_gradient(forward, (number, depth), listener)
        observer.record_state(forward, number, depth, tensor)
    if structure.read is not None:
        assert structure.read.first is not None
        _record_read(tape, forward, observer, structure.read.first)
        structure.read.keep()
        return
    connection_calls = {(call.path, call.index): call for call in tape.calls if call.site is not None}
    for number, connection in enumerate(structure.connections):
        call = connection_calls[connection.path, connection.index]
        _replay_connection(call, forward, observer, number, connection)
    for number, chain in enumerate(structure.chains):
        for position, connection in enumerate(chain.connections):
            if connection.branch_path is not None:
                branch = calls[connection.branch_path, FORWARD, connection.branch_index]
                observer.record_branch(forward, number, position, branch.y)


def record_traced(tape: Tape, forward: Forward, observer: Observer) -> None:
    """Read the connections whose weights only the trace of a forward shows.

    ``tape``: the calls of the forward, with its trace.
    """
    structure = observer.structure
    if structure.read is not None:
        assert tape.recorder is not None
        _record_read(tape, forward, observer, structure.read.again(tape.recorder.graph))
        return
    states = states_of(tape, structure.chains[0].points)
    if structure.chains[0].over_depth:
        _record_depth_weights(tape, forward, observer)
        return
    for number, connection in enumerate(structure.connections):
        before, after = states[connection.depth_in], states[connection.depth_out]
        if before is None or after is None:
            raise CaptureError(f"the trace of a forward did not see the states around {connection.path!r}")
        complete = read_traced(
            traced_connection(tape, before, after, structure.num_streams),
            structure.layouts[0],
            forward.batch_size,
            structure.num_streams,
        )
        sampled = None
        if len(forward.rows):
            sampled = complete.sampled(forward.rows)
            assert sampled.read is not None
            # What the branch takes is what its weights read from the streams: a linear map found in the trace.
            sampled.branch_in = sampled.read @ forward.states[0, connection.depth_in].to("cpu")
        observer.record_connection(forward, number, complete, sampled)
        _record_logits(tape, forward, observer, number, complete.mix)
    tape.logits = None


def _record_read(tape: Tape, forward: Forward, observer: Observer, memory: MemoryReading) -> None:
    """Record the coefficients of one forward, by the reading of its memory."""
    structure = observer.structure
    assert structure.read is not None
    for number, (weights, given) in enumerate(structure.read.weights(memory, forward.batch_size)):
        if isinstance(weights, DepthWeights):
            if len(forward.rows):
                forward.parts[0, number] = weights.sampled(forward.rows.cpu())
                assert given is not None
                forward.branches[0, number] = forward.sampled(given)
            forward.fired.add(("branch", 0, number))
            continue
        observer.record_connection(forward, number, weights)
        _record_logits(tape, forward, observer, number, weights.mix)
    tape.logits = None  # it holds tensors of the graph


def _record_logits(
    tape: Tape, forward: Forward, observer: Observer, number: int, mix: torch.Tensor | None
) -> None:
    chain = observer.structure.chains[0]
    before = tape.recorded(chain.points[chain.connections[number].depth_in])
    if before is not None:
        observer.record_logits(forward, number, mix, tape.logits, before.number)


def _record_depth_weights(tape: Tape, forward: Forward, observer: Observer) -> None:
    found = find_depth_reads(tape)
    chain = observer.structure.chains[0]
    if found is None or len(found.reads) != len(chain.points):
        raise CaptureError("the branches read other sums over depth than in the first measured forward")
    weights = read_weights(found, observer.structure.layouts[0], forward.batch_size)
    for number in range(len(chain.connections)):
        own = number + 1
        carry = weights[:, :, own].clone()
        carry[..., own] = 0
        parts = DepthWeights(weights[:, :, number], carry, weights[:, :, own, own])
        if len(forward.rows):
            forward.parts[0, number] = parts.sampled(forward.rows.cpu())


def _replay_connection(
    call: Call, forward: Forward, observer: Observer, number: int, connection: Connection
) -> None:
    if call.closing is not None and call.closing.parts is not None:
        observer.record_connection(forward, number, call.closing.parts)
    elif isinstance(BY_NAME[connection.style], ForwardFamily) and call.x is not None:
        x, site = call.x.detach(), observer.structure.sites[number]

        def computed(rows: torch.Tensor | None) -> list[torch.Tensor]:
            """What the module computes inside, which no watch could look for before it was known as a connection."""
            chosen = x
            if rows is not None:
                chosen = x[:, rows] if site.layout.startswith("N B") else x[rows]
            watch = returned_watch(chosen, site)
            # Its forward alone runs once more, in the user's precision and without hooks, which a call of the module would
            # run: on the sampled sequences for H_pre, on all of them for an H_res that is not returned, whose gains are added
            # up over every token. Where it cannot run again (sharded weights are gone by now, for one) H_pre is solved from
            # the states, and an H_res that is not returned is refused.
            with suppress(Exception), preserved_state(call.module), user_autocast(), watch:
                unhooked_twin(call.module).forward(chosen)
            return watch.floating()

        observer.record_returned(forward, number, x, call.output, computed)


def _first_value(tape: Tape, point: HookPoint) -> tuple[TracedValue | None, torch.Tensor]:
    """What a hook point showed in the first forward: its value, and the tensor as it was then."""
    value = tape.recorded(point)
    if point.at != "operation":
        call = tape.by_key()[point.path, point.method, point.index]
        tensor, written = call.passed(point.at, point.item)
        if (point.at, point.item) == ("output", 0) and call.copy is not None:
            return value, call.copy
        if tensor is not None and written == version(tensor):
            return value, tensor
    if value is None or tape.recorder is None or not tape.recorder.graph.is_kept(value):
        raise RewrittenError(
            f"the state at {point.path} was not kept in the first forward, or it was rewritten in place since; call the model "
            "once more: from the second forward on states are copied as they pass"
        )
    return value, tape.recorder.graph.tensor(value)
