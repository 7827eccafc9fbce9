"""What is recorded of the states, gradients and connections that pass through a model, and by which hooks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from depthscope.probes.connections.proof import DepthWeights, Parts
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, in_recomputation
from depthscope.probes.model.modules import find_mask, fit_mask
from depthscope.probes.model.tensors import floats_in
from depthscope.probes.model.user_modes import compute_dtype
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue, ValuePlace
from depthscope.probes.reading.tensor_memory import detached, stacked
from depthscope.probes.session.attention import AttentionPlaces, later_attention
from depthscope.probes.session.forward import CurrentForward, Forward, GradientListener, Key, TensorKey
from depthscope.probes.session.step import Step
from depthscope.probes.statistics.live_sums import LiveSums
from depthscope.probes.statistics.token_sums import TokenSums, coefficient_sums
from depthscope.probes.statistics.weight_updates import unreadable
from depthscope.probes.structure.model_structure import FINAL, ShownTensor, Structure

T = TypeVar("T")


class Observer:
    """Records what passes through a model of known structure; the first forward and all later ones feed it in the same way.

    ``structure``: what the model was found to be in the forward that has this ``graph``.
    ``attention``: where the model attends.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        step: Step,
        current: CurrentForward,
        attention: AttentionPlaces,
        graph: Graph,
    ):
        self.model, self.structure = model, structure
        self._step, self._current, self._attention = step, current, attention
        self.origins: Any = None  # of the coefficients, where they were asked for and are known
        self.dtype = torch.float32  # of the states recorded last
        self.precision = torch.float32  # in which they are multiplied: autocast's, where it is on
        # Called with chain, depth, every state as it is shown, and the model's own tensors that hold it.
        self.on_state: Callable[[int, int, torch.Tensor, tuple[torch.Tensor, ...]], None] | None = None
        self.unread: set[TensorKey] = set()  # streams of which nothing is made
        self._calls = Counter(call.path for call in graph.calls)
        # When each state was shown: a later one may be shown first, and one of several streams is there with the last of them.
        self._times: dict[Key, float] = {}
        self.made_by: dict[ValuePlace, list[ShownTensor]] = {}  # states that operations alone show
        for of in structure.shown:
            moment = of.point.moment_in(graph)
            self._times[of.key[:2]] = max(moment, self._times.get(of.key[:2], -math.inf))
            if of.point.at == "operation":
                self.made_by.setdefault(of.point.place, []).append(of)
        # The biases and gates of the connections, stored with the statistics; of one set of weights no value moves.
        has_steps = step.scope.sums and not step.scope.only_own and bool(structure.connections)
        self.parameters = connection_parameters(model, structure) if has_steps else {}

    # --- hooks on the modules that show the structure ---

    def attach(self, attachment: Attachment) -> None:
        """Put the hooks on; those of one module run in this order, so its input is read before it may rewrite it."""
        modules = dict(self.model.named_modules(remove_duplicate=False))  # a shared block has several paths
        shown: dict[str, dict[str, list[ShownTensor]]] = {"input": {}, "output": {}, "operation": {}}
        for of in self.structure.shown:
            shown[of.point.at].setdefault(of.point.path, []).append(of)
        for path, states in shown["input"].items():
            attachment.before(modules[path], partial(self._record_states, "input", path, states))
        if any(self._attention.expected):
            watch = partial(later_attention, self._attention, self._current)
            attachment.around(self.model, "forward", watch)
        branches = {c.branch_path for chain in self.structure.chains for c in chain.connections}
        for path in filter(None, branches):
            attachment.after(modules[path], partial(self._after_branch, path))
        for path, states in shown["output"].items():
            attachment.after(modules[path], partial(self._record_states, "output", path, states))

    def _record_states(
        self, side: str, path: str, states: Sequence[ShownTensor], module: nn.Module, *given: Any
    ) -> None:
        """Record the states that one call shows: those whose turn it is, where a module is called several times.

        ``given``: the arguments of the call and its keywords, then what it returned where it has ended.
        """
        tensors = floats_in(*(given[2:] or given))
        if not tensors or self._current.foreign:
            return
        if in_recomputation():
            self._hook_recomputed(states, tensors)
            return
        forward = self._current.recorded
        if forward is None:
            return
        # Counted by side: a module may have a hook on one of them only.
        index = forward.next_index(side, path)
        for state in states:
            if state.point.index == index and state.point.item < len(tensors):
                self.record_shown(forward, state, tensors[state.point.item])
                self.hook_gradient(forward, state, tensors[state.point.item])

    def _hook_recomputed(self, states: Sequence[ShownTensor], tensors: list[torch.Tensor]) -> None:
        """Hook the gradients of states that a checkpoint recomputes.

        A reentrant checkpoint runs its forward without a graph: only the tensors of the recomputation have gradients. A
        non-reentrant one has hooks from the forward already, and `hook_gradient` adds none. The index of a call is
        unknown here, since checkpoints are recomputed from the last to the first, so a module that shows several states
        by several calls is left out.
        """
        if len({state.point.item for state in states}) != len(states):
            return
        for state in states:
            item = state.point.item
            if item < len(tensors) and tensors[item].requires_grad:
                waiting = [of for of in self._step.forwards if state.key not in of.expected_gradients]
                if len(waiting) > 1:
                    raise CaptureError(
                        "a reentrant checkpoint was recomputed when several forwards waited for their gradients, which "
                        "cannot be distinguished; run each backward before the next forward, or use use_reentrant=False"
                    )
                for forward in waiting:
                    self.hook_gradient(forward, state, tensors[item])

    def _after_branch(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, tensor = self._current.recorded, next(iter(floats_in(output)), None)
        if forward is None or tensor is None:
            return
        call = path, forward.next_index("branch", path)
        for number, chain in enumerate(self.structure.chains):
            for position, connection in enumerate(chain.connections):
                if (connection.branch_path, connection.branch_index) == call:
                    self.record_branch(forward, number, position, tensor)

    # --- states that operations alone show ---

    def meet(self, forward: Forward, value: TracedValue, tensor: torch.Tensor) -> None:
        """Hook the gradient of a value that is taken for the first time, if it is a state: the tensor has its graph by now."""
        if not value.is_floating or tensor.ndim < 2 or forward.cancelled or value.number in forward.met:
            return
        forward.met.add(value.number)
        for state in self.record_made(forward, value, tensor):
            self.hook_gradient(forward, state, tensor)

    def record_made(
        self, forward: Forward, value: TracedValue, tensor: torch.Tensor
    ) -> Sequence[ShownTensor]:
        """Record what is shown of states when the operation that makes it has run, or a part of it was written."""
        if not self.made_by or forward.recorder is None:
            return ()
        states = self.made_by.get(forward.recorder.graph.place(value), ())
        for state in states:
            known = state.stream in forward.streams.get(state.key[:2], ())
            if not known and ("state", state.chain, state.depth) not in forward.fired:
                self.record_shown(forward, state, tensor)
        return states

    # --- states ---

    def record_shown(self, forward: Forward, of: ShownTensor, tensor: torch.Tensor) -> None:
        """Record a state, or one stream of it: with the last of these the state is there, its streams along the first axis."""
        if of.num_tensors == 1:
            self.record_state(forward, of.chain, of.depth, tensor, (tensor,))
            return
        # Copied now: the model may write it before the other streams have come.
        streams = _with_other_streams(forward.streams, of, (tensor, detached(tensor, copy=True)))
        if streams is not None:
            own, copies = zip(*streams, strict=True)
            self.record_state(forward, of.chain, of.depth, stacked(copies), own)

    def record_state(
        self, forward: Forward, number: int, depth: int, tensor: torch.Tensor, own: tuple[torch.Tensor, ...]
    ) -> None:
        """Store the sampled sequences of a state in the model's layout, and add all of it to the statistics.

        ``own``: the model's tensors that hold it: itself, or one for each stream.
        """
        forward.fired.add(("state", number, depth))
        if self.on_state is not None:
            self.on_state(number, depth, tensor, own)
        if depth == FINAL and not len(forward.rows):
            return
        state = self.structure.canonical(number, tensor.detach(), forward.batch_size, depth)
        if len(forward.rows):
            # Copied now: the model may write the next state into the same tensor.
            forward.states[number, depth] = forward.sampled(state)
        if depth == FINAL:
            return
        forward.order.setdefault(number, []).append(depth)
        mask = self._chain_mask(forward, number, state)
        self.dtype, self.precision = tensor.dtype, compute_dtype(tensor)
        if not self._step.scope.sums:
            return
        self._sums(forward, number).add_state(depth, state, mask)

    def _sums(self, forward: Forward, number: int) -> TokenSums:
        """The sums of one chain, with what a live row needs of it where one is wanted."""
        sums, scope = forward.chain_sums(number), self._step.scope
        sums.is_exact = scope.exact_sums
        if sums.live is None and scope.live_tokens:
            sums.live = LiveSums(scope.live_tokens, self._step.options.seed)
        return sums

    def _chain_mask(self, forward: Forward, number: int, state: torch.Tensor) -> torch.Tensor | None:
        """The mask of a chain, found at its first state: an encoder and a decoder have one each."""
        if number not in forward.masks:
            prefix = "decoder_" if "decoder" in self.structure.chains[number].name else ""
            mask = find_mask(forward.arguments, self._step.options.mask, prefix)
            forward.masks[number] = None if mask is None else fit_mask(mask, state)
        return forward.masks[number]

    def require_usual_calls(self, forward: Forward) -> None:
        """Require that blocks ran as often, and in the order, that the structure was found from, or depths would be wrong."""
        for number, order in forward.order.items():
            times = [self._times[number, depth] for depth in order]
            if order != sorted(order) and times != sorted(times):
                raise CaptureError(
                    f"the states of {self.structure.chains[number].name or 'the model'} passed in another order ({order}) "
                    "than in the first measured step: the model's forward has changed"
                )
        for _, depth, _, point, *_ in self.structure.shown:
            ran = forward.call_counts.get((point.at, point.path), 0)
            usual = self._calls.get(point.path, ran)
            if depth != FINAL and ran > usual:
                raise CaptureError(
                    f"{point.path or 'the model'} ran {ran} times in a forward, {usual} times in the first measured one; "
                    "the states of the further calls have no depth"
                )

    # --- gradients ---

    def hook_gradient(self, forward: Forward, of: ShownTensor, tensor: torch.Tensor) -> None:
        """Put a hook on the gradient of what is shown of a state, where gradients are wanted and it will have one."""
        if self._step.options.gradients and tensor.requires_grad and of.key not in forward.expected_gradients:
            # Not a module's full backward hook: that one would put a function into the user's graph, and would see the
            # gradient of a module's call, not of a state that several calls read.
            self.expect_gradient(forward, of, get_gradient_edge(tensor))

    def hook_unread(self, forward: Forward, of: ShownTensor, tensor: torch.Tensor | None) -> None:
        """Hook the gradient of what no operation took, where its tensor is still there."""
        if tensor is None:
            self.unread.add(of.key)
        else:
            self.hook_gradient(forward, of, tensor)

    def expect_gradient(self, forward: Forward, of: ShownTensor, end: GradientEdge) -> None:
        """Record the gradient at an end as that of a state, or of one stream of it."""
        if of.is_shared:
            return
        receive = partial(self._record_shown_gradient, forward, of)
        forward.expected_gradients[of.key] = GradientListener(end, receive, self._step.loss.report)

    def _record_shown_gradient(
        self, forward: Forward, of: ShownTensor, gradient: torch.Tensor | None
    ) -> None:
        """Store the gradient of a state, of which each stream may have its own: then with the last of these.

        ``gradient``: as the backward gives it; None behind an operation that passes none on, such as a quantised layer.
        """
        # A backward inside of the forward is of something that is not the loss.
        if gradient is None or not forward.ended:
            return
        gradient, scale = gradient.detach(), self._step.loss.scale()
        if scale is not None:  # in float32: one that fits float16 only because it is scaled would underflow
            gradient = gradient.float() / scale.to(gradient.device)
        if of.num_tensors > 1:
            if of.stream in forward.stream_gradients.get(of.key[:2], ()):  # of another backward
                self.complete_gradient(forward, *of.key[:2])
            gradients = _with_other_streams(forward.stream_gradients, of, gradient)
            if gradients is None:
                return
            gradient = torch.stack(gradients)
        self._record_gradient(forward, of.chain, of.depth, gradient)

    def complete_gradient(self, forward: Forward, number: int, depth: int) -> None:
        """After the backward: the gradient of a state, with zeros for streams that it did not reach."""
        streams = forward.stream_gradients.pop((number, depth))
        keys = [of.key for of in self.structure.shown if of.key[:2] == (number, depth)]
        expected = forward.expected_gradients.keys() & set(keys)
        if not expected | self.unread >= set(keys):
            return  # of a stream that carries none, the gradient is not known
        # Later forwards listen to no tensor that no operation takes.
        self.unread |= {key for key in expected if key[2] not in streams}
        zero = torch.zeros_like(next(iter(streams.values())))
        self._record_gradient(
            forward, number, depth, torch.stack([streams.get(key[2], zero) for key in keys])
        )

    def _record_gradient(self, forward: Forward, number: int, depth: int, gradient: torch.Tensor) -> None:
        """Store a gradient; the gradients of several backwards through one forward add up.

        Their squares do not add up: after a second backward the statistics are recomputed where the sample is the complete
        batch, and undefined (NaN) elsewhere.
        """
        values = self.structure.canonical(number, gradient, forward.batch_size, depth)
        again = (number, depth) in forward.arrivals
        forward.arrivals[number, depth] += 1
        sampled = forward.sampled(values)
        if again:
            sampled = sampled + forward.gradients[number, depth]
            complete = len(forward.rows) == forward.batch_size
            values = sampled if complete else torch.full_like(values, torch.nan)
            forward.gradients_undefined |= not complete
        forward.gradients[number, depth] = sampled
        if depth != FINAL:
            mask = forward.masks.get(number)
            forward.chain_sums(number).add_gradient(depth, values, mask, anew=again)

    # --- connections ---

    def require_complete(self, forward: Forward) -> None:
        """Require that a forward showed each state and connection."""
        missing = [
            f"{self.structure.chains[number].name or 'depth'} {'final' if depth == FINAL else depth}: "
            f"{point.at} of {point.path or 'the model'}"
            for number, depth, stream, point, *_ in self.structure.shown
            if not stream and ("state", number, depth) not in forward.fired
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
        self.require_usual_calls(forward)

    def record_connection(self, forward: Forward, number: int, complete: Parts) -> None:
        """Record the coefficients of a connection."""
        forward.fired.add(("connection", 0, number))
        if len(forward.rows):
            rows = forward.rows.to(complete.write.device)
            forward.parts[0, number] = complete.sampled(rows)
        if not self._step.scope.sums:
            return
        sums, mask = self._sums(forward, 0), forward.masks.get(0)
        if sums.live is not None:
            sums.live.add_connection(number, complete.mix, complete.read, complete.write, mask)
        if complete.mix is not None:
            sums.add_mixing(number, complete.mix, mask)
        sums.add_values(number, coefficient_sums(complete, mask))
        sizes = self.parameters.get(number, {})
        # By name, since an optimizer or a loader may have put others in their place.
        parameters = [self.model.get_parameter(name).detach() for name in sizes]
        if sizes and sum(each.numel() for each in parameters) == sum(sizes.values()):
            values = torch.cat([each.flatten().float() for each in parameters])
            sums.latest.setdefault("connection_parameter", {})[number] = values

    def record_read(self, forward: Forward, memory: MemoryReading) -> None:
        """Record the coefficients of one forward, by the reading of its memory."""
        read = self.structure.read
        assert read is not None
        for number, weights in enumerate(read.weights(memory, forward.batch_size)):
            if not isinstance(weights, DepthWeights):
                self.record_connection(forward, number, weights)
            elif len(forward.rows):
                forward.parts[0, number] = weights.sampled(forward.rows.cpu())
        if self._step.scope.origins is not None and self.origins is None and self.structure.num_streams > 1:
            self.origins = self._step.scope.origins(read, memory, forward, self)

    def record_branch(self, forward: Forward, number: int, position: int, tensor: torch.Tensor) -> None:
        """Record the output of a branch: chain number, and position of its connection in the chain."""
        if len(forward.rows):
            # With streams a branch works on one stream's width, so the chain's layout does not fit its output.
            output = tensor.detach()
            if not self.structure.connections:
                own = self.structure.chains[number].connections[position].layout
                output = self.structure.canonical(number, output, forward.batch_size, own=own).squeeze(2)
            forward.branches[number, position] = forward.sampled(output)


def _with_other_streams(waiting: dict[Key, dict[int, T]], of: ShownTensor, stream: T) -> list[T] | None:
    """All streams of a state, with the last of them; None where others have not come."""
    streams = waiting.setdefault((of.chain, of.depth), {})
    streams[of.stream] = stream
    if len(streams) < of.num_tensors:
        return None
    del waiting[of.chain, of.depth]
    return [stream for _, stream in sorted(streams.items())]


def connection_parameters(model: nn.Module, structure: Structure) -> dict[int, dict[str, int]]:
    """The biases and gates of each connection that has some, with their numbers of elements.

    These are the parameters that the coefficients are computed from, with no more elements than the n² + 2n coefficients and
    no axis as wide as a state: static logits and biases, and the scalars α that scale what depends on the token.
    """
    n, width = structure.num_streams, structure.chains[0].shapes[0][-1]
    widths = {width, width // n, width * n}  # streams may be a part of it
    small = {
        name: of.numel()
        for name, of in model.named_parameters(remove_duplicate=False)
        if not unreadable(of) and of.numel() <= n * (n + 2) and not widths & set(of.shape)
    }
    # What several connections share is listed once.
    chosen = [
        {name: small.pop(name) for name in dict.fromkeys(connection.parameters) if name in small}
        for connection in structure.connections
    ]
    return {number: of for number, of in enumerate(chosen) if of}
