"""Does a mixing matrix learn that is uniform, or has no graph? One more forward, from whose outputs gradients are taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.computation import Doubt
from depthscope.probes.connections.logits import NO_GRAPH
from depthscope.probes.connections.mixing_logits import GRADIENTS, CoefficientOrigins, MixingLogits
from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.while_needed import eager
from depthscope.probes.reading.graph import TracedValue, ValuePlace
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.reading.recording import recording
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model
from depthscope.probes.session.session import Session

logger = logging.getLogger(__name__)


@contextmanager
def _all_require_gradients(model: nn.Module) -> Iterator[None]:
    """Frozen parameters take part in the graph too: what was computed from them shows in it alone."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and p.is_leaf]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def follow(
    session: Session,
    origins: CoefficientOrigins,
    batch: Any,
    loss_of: Callable[[Any, Any], torch.Tensor | None] | None = None,
) -> None:
    """Run a model once more on its first batch where that forward left open which gradients reach its coefficients.

    ``session``: that measured this batch; its hooks are off.
    ``origins``: of the coefficients; they get the gradients.
    """
    if not (origins.doubts or origins.pairs):
        return
    model = session.model
    recorder = GraphRecorder(model, list(tensors_in(batch)), holds=False)
    places = {
        at
        for doubt in origins.doubts.values()
        for at in (doubt.applied, *doubt.squares, *doubt.parameters, doubt.write)
    }
    places |= {at for pair in origins.pairs.values() for at in pair}
    taken: dict[ValuePlace | str, torch.Tensor] = {}

    def take(value: TracedValue, tensor: torch.Tensor) -> None:
        if value.func is not None and (place := recorder.graph.place(value)) in places:
            taken[place] = tensor

    recorder.on_taken = take
    try:
        # The random states are those before the measured forward, so that it drops what that one dropped.
        modes = preserved_state(model), eager(), own_call(session.owner), _all_require_gradients(model)
        with ExitStack() as stack:
            for mode in (*modes, torch.enable_grad()):
                stack.enter_context(mode)
            with recording(recorder):
                output = call_model(model, batch)
            loss = None if loss_of is None else loss_of(output, batch)
            weights = {
                name: p for name, p in model.named_parameters(remove_duplicate=False) if name in places
            }
            taken.update(weights)
            _set_gradients_of_doubts(origins, taken, list(tensors_in(output)))
            _set_gradients_of_loss(origins, taken, loss)
    except Exception as error:
        # It ran without the mode: a remark less, and no error of the user's.
        logger.info("the forward could not be followed: %s", without_frames(error))


def _set_gradients_of_doubts(
    origins: CoefficientOrigins, taken: dict[ValuePlace | str, torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    # One backward for all of them.
    asked: dict[int, list[torch.Tensor]] = {}
    for number, doubt in origins.doubts.items():
        if doubt.write in taken:
            asked[number] = [*_logits(doubt, taken), taken[doubt.write]]
    sizes = iter(_gradients([of for tensors in asked.values() for of in tensors], outputs))
    for number, tensors in asked.items():
        *logits, write = [next(sizes) for _ in tensors]
        # Without a path to either, such as where the model itself turns gradients off, nothing is known.
        known = max((size for size in logits if size is not None), default=None)
        if write is None or not (known is None or origins.doubts[number].is_uniform):
            continue
        origins.origins[number] = replace(origins.origins[number], gradients=(known, write))
        if known is None and origins.logits[number].logits is not None:
            origins.logits[number] = MixingLogits(NO_GRAPH)


def _logits(doubt: Doubt, taken: dict[ValuePlace | str, torch.Tensor]) -> list[torch.Tensor]:
    """The first tensor of the matrix's size with a graph, which none has in a function of autograd; none of a cut graph."""
    if doubt.applied in taken and not taken[doubt.applied].requires_grad:
        return []
    squares = (taken[at] for at in doubt.squares if at in taken)
    logits = next((tensor for tensor in squares if tensor.requires_grad), None)
    # Where one function computes all of it, only the parameters tell whether there is a path.
    return [logits] if logits is not None else [taken[name] for name in doubt.parameters if name in taken]


def _gradients(tensors: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[float | None]:
    """The largest gradients of a random combination of the outputs; None where autograd has no path to a tensor."""
    generator = torch.Generator().manual_seed(0)
    carrying = [output for output in outputs if output.is_floating_point() and output.requires_grad]
    wanted = [position for position, tensor in enumerate(tensors) if tensor.requires_grad]
    found: list[float | None] = [None] * len(tensors)
    if not carrying or not wanted:
        return found
    terms = [
        (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        for output in carrying
    ]
    gradients = torch.autograd.grad(
        torch.stack(terms).sum(), [tensors[at] for at in wanted], retain_graph=True, allow_unused=True
    )
    for position, gradient in zip(wanted, gradients, strict=True):
        found[position] = None if gradient is None else float(gradient.abs().max())
    return found


def _set_gradients_of_loss(
    origins: CoefficientOrigins, taken: dict[ValuePlace | str, torch.Tensor], loss: torch.Tensor | None
) -> None:
    pairs = {number: [taken[at] for at in pair if at in taken] for number, pair in origins.pairs.items()}
    pairs = {
        number: pair
        for number, pair in pairs.items()
        if len(pair) == 2 and all(of.requires_grad for of in pair)
    }
    if loss is None or not loss.requires_grad or not pairs:
        return
    # Tensors inside of the graph alone: no parameter's gradient is written.
    tensors = [tensor for pair in pairs.values() for tensor in pair]
    gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
    for number, pair in pairs.items():
        for name, gradient in zip(GRADIENTS, [next(gradients) for _ in pair], strict=True):
            origins.set_gradient(number, name, 0.0 if gradient is None else float(gradient.double().norm()))
