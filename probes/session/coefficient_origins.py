"""From what does a model compute the coefficients of its connections, and do these learn? Asked by `settle` alone.

The operations of the first forward tell; where they leave open whether gradients reach a matrix, one more forward does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from depthscope.probes.connections.computation import Doubt, Origin, Search
from depthscope.probes.connections.proof import Parts, StreamConnectionError
from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.model.preserved_state import eager, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import ReadingError, TracedValue, ValuePlace
from depthscope.probes.reading.recorder import GraphRecorder, recording
from depthscope.probes.session.forward import Forward, own_call
from depthscope.probes.session.model_call import call_model, requiring_gradients
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.session import Session
from depthscope.probes.structure.model_structure import ReadStructure

logger = logging.getLogger(__name__)


@dataclass
class CoefficientOrigins:
    """What is known of the coefficients of all connections in the sampled sequences of one batch.

    ``indices``: of these sequences, over all forwards.
    ``origins``: by connection.
    ``doubts``: where the gradients are of matrices that may not learn, by connection.
    """

    indices: list[int]
    origins: list[Origin] = field(default_factory=list)
    doubts: dict[int, Doubt] = field(default_factory=dict)


def find_origins(
    read: ReadStructure, memory: MemoryReading, forward: Forward, observer: Observer
) -> CoefficientOrigins | None:
    """From what the coefficients were computed in a forward that has ended, whose tensors are held.

    Returns: None where no sequence was sampled, or the operations cannot be followed.
    """
    rows = sorted(forward.rows.tolist())
    order = torch.tensor([forward.rows.tolist().index(row) for row in rows])
    parts = [forward.parts[key] for key in sorted(forward.parts) if key[0] == 0]
    sampled = [of.at(order) for of in parts if rows and isinstance(of, Parts)]
    if not sampled:
        return None
    found = CoefficientOrigins([forward.first_index + row for row in rows])
    try:
        search = Search(
            *(read.rereading.graph, memory, read.connections(memory), sampled, forward.batch_size),
            *(sampled[0].write.shape[1], rows, observer.precision),
            partial(read.token_norms, memory),
        )
        for number in range(len(sampled)):
            found.origins.append(search.origin(number))
            doubt = search.doubt(number)
            if doubt is not None:
                found.doubts[number] = doubt
            search.rerun.forget(search.numbers[number])
    except (ReadingError, StreamConnectionError, LayoutError, RuntimeError) as error:
        # A remark less, and no error of the user's.
        logger.info("the coefficients could not be followed: %s", error)
        return None
    return found


def follow(session: Session, origins: CoefficientOrigins, batch: Any) -> None:
    """Run a model once more on its first batch where that forward left open whether gradients reach its coefficients.

    ``session``: that measured this batch; its hooks are off.
    ``origins``: of the coefficients; they get the gradients.
    """
    model = session.model
    recorder = GraphRecorder(model, list(tensors_in(batch)), holds=False)
    places = {
        at for of in origins.doubts.values() for at in (of.applied, *of.squares, *of.parameters, of.write)
    }
    taken: dict[ValuePlace | str, torch.Tensor] = {}

    def take(value: TracedValue, tensor: torch.Tensor) -> None:
        if value.func is not None and (place := recorder.graph.place(value)) in places:
            taken[place] = tensor

    recorder.on_taken = take
    try:
        # What was computed from frozen parameters shows in the graph alone.
        frozen = [
            p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and p.is_leaf
        ]
        # The random states are those before the measured forward, so that it drops what that one dropped.
        with (
            preserved_state(model), eager(), own_call(session.owner), requiring_gradients(frozen), torch.enable_grad(),
        ):  # fmt: skip
            with recording(recorder):
                output = call_model(model, batch)
            taken.update((n, p) for n, p in model.named_parameters(remove_duplicate=False) if n in places)
            _set_gradients(origins, taken, list(tensors_in(output)))
    except Exception as error:
        # It ran without the mode: a remark less, and no error of the user's.
        logger.info("the forward could not be followed: %s", without_frames(error))


def _set_gradients(
    origins: CoefficientOrigins, taken: dict[ValuePlace | str, torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    # One backward for all of them.
    asked = {
        number: [*_logits(doubt, taken), taken[doubt.write]]
        for number, doubt in origins.doubts.items()
        if doubt.write in taken
    }
    sizes = iter(_gradients([of for tensors in asked.values() for of in tensors], outputs))
    for number, tensors in asked.items():
        *logits, write = [next(sizes) for _ in tensors]
        # Without a path to either, such as where the model itself turns gradients off, nothing is known.
        known = max((size for size in logits if size is not None), default=None)
        if write is not None and (known is None or origins.doubts[number].is_uniform):
            origins.origins[number] = replace(origins.origins[number], gradients=(known, write))


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
    terms = [
        (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        for output in outputs
        if output.is_floating_point() and output.requires_grad
    ]
    wanted = [position for position, tensor in enumerate(tensors) if tensor.requires_grad]
    found: list[float | None] = [None] * len(tensors)
    if terms and wanted:
        asked = [tensors[at] for at in wanted]
        gradients = torch.autograd.grad(torch.stack(terms).sum(), asked, allow_unused=True)
        for position, gradient in zip(wanted, gradients, strict=True):
            found[position] = None if gradient is None else float(gradient.abs().max())
    return found
