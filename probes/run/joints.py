"""What did the sampled sequences show around each connection? States before and after it, and its coefficients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.proof import Joint
from depthscope.probes.session.reservoir import Sequence, padded, token_masks
from depthscope.probes.session.session import Session


def sampled_joints(session: Session, sequences: list[Sequence]) -> list[Joint]:
    """States and parts around every stream connection, from the sampled sequences.

    Returns: One for each connection, in order; tensors (K, T, …).
    """
    return [_joint(session, number, sequences) for number in range(len(session.structure.connections))]


def _joint(session: Session, number: int, sequences: list[Sequence]) -> Joint:
    sampled = [parts for s in sequences if isinstance(parts := s.parts[0, number], Parts)]
    # Chain 0: only the first chain has stream connections.
    link, mask = session.structure.connections[number], np.stack(token_masks(sequences, 0))
    tokens = mask.shape[1]

    def stack(pick: Callable[[Parts], torch.Tensor | None]) -> torch.Tensor | None:
        """One part of every sequence, (K, T, …); None where some sequence lacks it."""
        found = [tensor for parts in sampled if (tensor := pick(parts)) is not None]
        return (
            torch.stack([padded(tensor, tokens) for tensor in found]) if len(found) == len(sampled) else None
        )

    def states(depth: int) -> torch.Tensor:
        return torch.stack([padded(sequence.states[0, depth], tokens) for sequence in sequences])

    write, branch_in, branch_out = (
        stack(pick) for pick in (lambda p: p.write, lambda p: p.branch_in, lambda p: p.branch_out)
    )
    assert write is not None
    assert branch_in is not None
    assert branch_out is not None
    constant = stack(lambda parts: parts.constant)
    after = states(link.depth_out)
    return Joint(
        path=link.path,
        x_in=states(link.depth_in),
        x_out=after if constant is None else after - constant,
        parts=Parts(
            stack(lambda p: p.mix),
            stack(lambda p: p.read),
            write,
            branch_in,
            branch_out,
        ),
        mask=torch.from_numpy(mask),
        # In which the model multiplies them, so that the tolerance is that of its rounding: autocast's, where it is on.
        dtype=session.observer.precision,
        casts=() if session.structure.read is None else session.structure.read.casts,
    )
