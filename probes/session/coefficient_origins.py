"""From what does a model compute the coefficients of its connections, and do these learn? Asked by `settle` alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch

from depthscope.probes.connections.computation import Origin, Search
from depthscope.probes.connections.proof import Parts, StreamConnectionError
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import ReadingError
from depthscope.probes.session.forward import Forward
from depthscope.probes.session.observer import Observer
from depthscope.probes.structure.model_structure import ReadStructure

logger = logging.getLogger(__name__)


@dataclass
class CoefficientOrigins:
    """What is known of the coefficients of all connections in the sampled sequences of one batch."""

    indices: list[int]  # of these sequences, over all forwards
    origins: list[Origin]  # by connection


def find_origins(
    read: ReadStructure, memory: MemoryReading, forward: Forward, observer: Observer
) -> CoefficientOrigins | None:
    """From what the coefficients were computed in a forward that has ended; None where that cannot be followed."""
    rows = sorted(forward.rows.tolist())
    order = torch.tensor([forward.rows.tolist().index(row) for row in rows])
    parts = [forward.parts[key] for key in sorted(forward.parts) if key[0] == 0]
    sampled = [of.at(order) for of in parts if rows and isinstance(of, Parts)]
    if not sampled:
        return None
    try:
        search = Search(
            *(read.rereading.graph, memory, read.connections(memory), sampled, forward.batch_size),
            *(sampled[0].write.shape[1], rows, observer.precision),
            partial(read.token_norms, memory),
        )
        origins = [search.origin(number) for number in range(len(sampled))]
    except (ReadingError, StreamConnectionError, LayoutError, RuntimeError) as error:
        # A remark less, and no error of the user's.
        logger.info("the coefficients could not be followed: %s", error)
        return None
    return CoefficientOrigins([forward.first_index + row for row in rows], origins)
