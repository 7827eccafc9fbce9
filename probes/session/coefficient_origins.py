"""From what does a model compute the coefficients of its connections? Found in the operations of its first forward."""

from __future__ import annotations

import logging
from functools import partial

import torch

from depthscope.probes.connections.coefficients import Parts, StreamConnectionError
from depthscope.probes.connections.computation import Search
from depthscope.probes.connections.logits import FoundLogits
from depthscope.probes.connections.mixing_logits import GRADIENTS, CoefficientOrigins, mixing_logits
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import PARAMETER, Graph, ReadingError, TracedValue
from depthscope.probes.session.forward import Forward
from depthscope.probes.session.gradient_hooks import GradientListener
from depthscope.probes.session.observer import Observer
from depthscope.probes.structure.read_parts import ReadStructure

logger = logging.getLogger(__name__)


def find_origins(
    read: ReadStructure, memory: MemoryReading, forward: Forward, observer: Observer
) -> CoefficientOrigins | None:
    """From what the coefficients were computed in a forward that has ended, whose tensors are held.

    Returns: None where no sequence was sampled, or the operations cannot be followed.
    """
    rows = sorted(forward.rows.tolist())
    order = [forward.rows.tolist().index(row) for row in rows]
    parts = [forward.parts[key] for key in sorted(forward.parts) if key[0] == 0]
    if not rows or not parts:
        return None
    sampled = [of.at(torch.tensor(order)) for of in parts if isinstance(of, Parts)]
    tokens = sampled[0].write.shape[1]
    precision, autocast = observer.precision, observer.precision != observer.dtype
    origins = CoefficientOrigins([forward.first_index + row for row in rows], tokens)
    try:
        search = Search(
            read.rereading.graph, memory, read.connections(memory), sampled, forward.batch_size, tokens, rows, precision,
            autocast, partial(read.token_norms, memory),
        )  # fmt: skip
        for number in range(len(sampled)):
            origins.origins.append(search.origin(number))
            logits, found = mixing_logits(search, number)
            origins.logits.append(logits)
            doubt = search.doubt(number)
            if doubt is not None:
                origins.doubts[number] = doubt
            if observer.options.gradients and found is not None:
                _listen(origins, number, found, search.graph, forward, observer)
            search.rerun.forget(search.numbers[number])
    except (ReadingError, StreamConnectionError, LayoutError, RuntimeError) as error:
        # A remark less, and no error of the user's.
        logger.info("the coefficients could not be followed: %s", error)
        return None
    return origins


def _listen(
    origins: CoefficientOrigins,
    number: int,
    found: FoundLogits,
    graph: Graph,
    forward: Forward,
    observer: Observer,
) -> None:
    """Listen to the gradients of the logits and of the matrix of a connection."""
    listeners = [_listener(value, forward, observer) for value in (found.logits, found.matrix)]
    if any(listener is None for listener in listeners):
        origins.pairs[number] = graph.place(found.logits), graph.place(found.matrix)
        return
    for name, listener in zip(GRADIENTS, listeners, strict=True):
        assert listener is not None
        origins.set_gradient(number, name, 0.0)

        def receive(gradient: torch.Tensor | None, name: str = name) -> None:
            norm = 0.0 if gradient is None else float(gradient.double().norm())
            origins.set_gradient(number, name, norm)

        listener.receivers.append(receive)
        forward.other_ends.append(listener)


def _listener(value: TracedValue, forward: Forward, observer: Observer) -> GradientListener | None:
    """What listens to the gradient of a value; None where it has none."""
    if value.kind == PARAMETER and value.held is not None and value.held.requires_grad:
        return GradientListener(value.held, observer.report)
    return forward.listeners.get(value.number)
