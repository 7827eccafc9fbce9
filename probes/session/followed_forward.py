"""From what does a model compute the coefficients of its connections? One more forward, whose graph is kept and walked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.computed_forward import ComputedForward, values_of_connections
from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.forced_eager import eager
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
    batch: Any,
    first: int,
    batch_size: int,
    loss_of: Callable[[Any, Any], torch.Tensor | None] | None = None,
) -> ComputedForward | None:
    """Run a model with streams once more on its first batch, and keep what its coefficients were computed from.

    ``session``: that measured this batch; its hooks are off.
    ``first, batch_size``: index of its first sequence among all, and number of its sequences.
    Returns: None where the model has no streams, no sequence of the batch was sampled, or the forward cannot be
    followed.
    """
    structure = session.structure
    stored = sorted(session.step.reservoir.stored.values(), key=lambda sequence: sequence.index)
    sampled = [s for s in stored if first <= s.index < first + batch_size]
    if not structure.connections or not sampled:
        return None
    (tokens, n, width) = sampled[0].states[0, structure.connections[0].depth_in].shape
    model = session.model
    recorder = GraphRecorder(model, list(tensors_in(batch)), holds=False)
    computed = values_of_connections(recorder, n, width, batch_size * tokens)
    try:
        # The random states are those before the measured forward, so that it drops what that one dropped.
        modes = preserved_state(model), eager(), own_call(session.owner), _all_require_gradients(model)
        with ExitStack() as stack:
            for mode in (*modes, torch.enable_grad()):
                stack.enter_context(mode)
            with recorder:
                output = call_model(model, batch)
            graph = recorder.end(output)
            loss = None if loss_of is None else loss_of(output, batch)
    except Exception as error:
        # It ran without the mode: a remark less, and no error of the user's.
        logger.info("the forward could not be followed: %s", without_frames(error))
        return None
    if graph.error is not None:
        logger.info("the forward could not be followed: %s", graph.error)
        return None
    weights, observer = dict(model.named_parameters(remove_duplicate=False)), session.observer
    return ComputedForward(
        graph=graph,
        values=computed.in_order(),
        parameters={n: weights[name] for n, name in graph.parameter_names.items() if name in weights},
        outputs=[tensor for tensor in tensors_in(output) if tensor.is_floating_point()],
        batch_size=batch_size,
        tokens=tokens,
        canonical=lambda state: structure.canonical(0, state, batch_size),
        shape=tuple(structure.chains[0].shapes[0]),
        precision=observer.precision,
        autocast=observer.precision != observer.dtype,
        rows=[sequence.index - first for sequence in sampled],
        loss=loss,
    )
