"""What is recorded of the states, gradients and connections that pass through a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from depthscope.probes.connections.proof import Parts
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Report
from depthscope.probes.model.modules import find_mask, fit_mask
from depthscope.probes.model.user_modes import compute_dtype
from depthscope.probes.reading.tensor_memory import detached, stacked
from depthscope.probes.session.forward import Forward, GradientListener, Key, TensorKey
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.statistics.live_sums import LiveSums
from depthscope.probes.statistics.token_sums import TokenSums, coefficient_sums
from depthscope.probes.statistics.weight_updates import unreadable
from depthscope.probes.structure.model_structure import FINAL, ShownTensor, Structure

T = TypeVar("T")


class Observer:
    """Records what passes through a model of known structure; the first forward and all later ones feed it in the same way.

    ``structure``: what the model was found to be.
    ``loss_scale``: gives the factor by which the loss, and so every gradient, is multiplied at present; None for 1.
    ``calls``: how often each module was called in the forward that showed the structure.
    ``times``: when each state was shown in it, by chain and depth; a later state may be shown first.
    ``parameters``: the biases and gates of the connections, whose values are stored with the statistics.
    """

    def __init__(
        self,
        structure: Structure,
        options: Options,
        report: Report,
        loss_scale: Callable[[], torch.Tensor | None] | None,
        scope: Scope,
        *,
        calls: Mapping[str, int],
        times: Mapping[tuple[int, int], float],
        parameters: ConnectionParameters | None = None,
    ):
        self.structure = structure
        self.options = options
        self.parameters = parameters
        # For each connection the bias or gate that each stored value belongs to.
        self.parameter_cells = {} if parameters is None else parameters.cells
        self.origins: Any = None  # of the coefficients, where they were asked for and are known
        self.dtype = torch.float32  # of the states recorded last
        self.precision = torch.float32  # in which they are multiplied: autocast's, where it is on
        # Called with chain, depth, every state as it is shown, and the model's own tensors that hold it.
        self.on_state: Callable[[int, int, torch.Tensor, tuple[torch.Tensor, ...]], None] | None = None
        self.report = report
        self._loss_scale = loss_scale
        self._calls, self._times = calls, times
        self.scope = scope
        self.unread: set[TensorKey] = set()  # streams of which nothing is made

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
        """Store the sampled sequences of a state, and add all of it to the statistics.

        ``number, depth``: chain and depth (`FINAL` after the last norm).
        ``tensor``: the state in the model's own layout.
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
        if not self.scope.sums:
            return
        sums = forward.chain_sums(number)
        sums.is_exact = self.scope.exact_sums
        self._begin_live(sums)
        sums.add_state(depth, state, mask)

    def _begin_live(self, sums: TokenSums) -> LiveSums | None:
        """What a live row needs of a chain in this forward; None where none is wanted."""
        if sums.live is None and self.scope.live_tokens:
            sums.live = LiveSums(self.scope.live_tokens, self.options.seed)
        return sums.live

    def _chain_mask(self, forward: Forward, number: int, state: torch.Tensor) -> torch.Tensor | None:
        """The mask of a chain, found at its first state: an encoder and a decoder have one each."""
        if number not in forward.masks:
            prefix = "decoder_" if "decoder" in self.structure.chains[number].name else ""
            mask = find_mask(forward.arguments, self.options.mask, prefix)
            forward.masks[number] = None if mask is None else fit_mask(mask, state)
        return forward.masks[number]

    def require_usual_calls(self, forward: Forward) -> None:
        """Require that blocks ran as often, and in the order, that the structure was found from.

        ``forward``: A forward in which every state showed.
        Raises CaptureError: Where a block ran more often, or the states passed in another order: they would get the
        wrong depths.
        """
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
        if self.options.gradients and tensor.requires_grad and of.key not in forward.expected_gradients:
            # Not a module's full backward hook: that one would put a function into the user's graph, and would see the
            # gradient of a module's call, not of a state that several calls read.
            self.expect_gradient(forward, of, GradientListener(tensor, self.report))

    def expect_gradient(self, forward: Forward, of: ShownTensor, listener: GradientListener) -> None:
        """Record the gradient that a listener receives as that of a state, or of one stream of it."""
        if of.is_shared:
            return
        listener.receivers.append(partial(self._record_shown_gradient, forward, of))
        if all(
            (chain, depth) == of.key[:2] or chain != of.chain
            for chain, depth, _ in forward.expected_gradients
        ):
            forward.first_states.append(of.key)
        forward.expected_gradients[of.key] = listener

    def _record_shown_gradient(
        self, forward: Forward, of: ShownTensor, gradient: torch.Tensor | None
    ) -> None:
        """Store the gradient of a state, of which each stream may have its own: then with the last of these.

        ``gradient``: as the backward gives it; None behind an operation that passes none on, such as a quantised layer.
        """
        # A backward inside of the forward is of something that is not the loss.
        if gradient is None or not forward.ended:
            return
        gradient, scale = gradient.detach(), None if self._loss_scale is None else self._loss_scale()
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
        if not self.scope.sums:
            return
        sums, mask = forward.chain_sums(0), forward.masks.get(0)
        live = self._begin_live(sums)
        if live is not None:
            live.add_connection(number, complete.mix, complete.read, complete.write, mask)
        if complete.mix is not None:
            sums.add_mixing(number, complete.mix, mask)
        sums.add_values(number, coefficient_sums(complete, mask))
        values = None if self.parameters is None else self.parameters.values(number)
        if values is not None:
            sums.latest.setdefault("connection_parameter", {})[number] = values

    def record_branch(
        self, forward: Forward, number: int, position: int, tensor: torch.Tensor | None
    ) -> None:
        """Record the output of a branch: chain number, and position of its connection in the chain."""
        if tensor is None:
            return
        forward.fired.add(("branch", number, position))
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


class ConnectionParameters:
    """The biases and gates of the connections.

    These are the parameters that the coefficients are computed from, with no more elements than the n² + 2n coefficients and
    no axis as wide as a state: static logits and biases, and the scalars α that scale what depends on the token.

    ``model``: the user's model; its parameters are only read.
    ``structure``: what it was found to be.
    ``cells``: for each connection that has some, the parameter that each element of `values` belongs to.
    """

    def __init__(self, model: nn.Module, structure: Structure):
        self._model, self._structure = model, structure
        self._names: dict[int, tuple[str, ...]] = {}
        self.cells: dict[int, tuple[str, ...]] = {}
        own, listed = dict(model.named_parameters(remove_duplicate=False)), set[str]()
        for number, connection in enumerate(structure.connections):
            names = [name for name in connection.parameters if name in own and name not in listed]
            chosen = {name: own[name] for name in names if self._is_small(own[name])}
            listed.update(chosen)  # what several connections share is listed once
            if chosen:
                self._names[number] = tuple(chosen)
                self.cells[number] = tuple([name for name, of in chosen.items() for _ in range(of.numel())])

    def _is_small(self, parameter: nn.Parameter) -> bool:
        n = self._structure.num_streams
        width = self._structure.chains[0].shapes[0][-1]  # streams may be a part of it
        widths = {width, width // n, width * n}
        return (
            not unreadable(parameter)
            and parameter.numel() <= n * (n + 2)
            and not widths & set(parameter.shape)
        )

    def values(self, number: int) -> torch.Tensor | None:
        """The present values of a connection's biases and gates, one after another; None where it has none.

        Returns: A copy in float32, as long as its `cells`.
        """
        names = self._names.get(number, ())
        # By name, since an optimizer or a loader may have put others in their place.
        parameters = [self._model.get_parameter(name) for name in names]
        if not parameters or sum(each.numel() for each in parameters) != len(self.cells[number]):
            return None
        return torch.cat([each.detach().flatten().float() for each in parameters])
