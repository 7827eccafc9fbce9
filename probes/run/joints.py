"""What did the sampled sequences show around each connection? States before and after it, and its coefficients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from depthscope.probes.connections.coefficients import Parts, as_views
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

    write, branch_in = stack(lambda parts: parts.write), stack(lambda parts: parts.branch_in)
    assert write is not None
    assert branch_in is not None
    branch_out = stack(lambda parts: parts.branch_out)
    # Only where no closing method took it: that one shows exactly what is added.
    if branch_out is None:
        branch_out = _hooked_branches(number, sequences, tokens, write.shape[-1], branch_in.shape[-1])
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
            stack(lambda p: p.read_known),
        ),
        mask=torch.from_numpy(mask),
        # In which the model multiplies them, so that the tolerance is that of its rounding: autocast's, where it is on.
        dtype=session.observer.precision,
    )


def _hooked_branches(
    number: int, sequences: list[Sequence], tokens: int, views: int, width: int
) -> torch.Tensor | None:
    """The branch's output by a hook on its module, (K, T, V, D); None where it has another number of elements."""
    outputs = [sequence.branches.get((0, number)) for sequence in sequences]
    found = [
        as_views(t.unsqueeze(0), 1, t.numel() // (views * width), views, width)
        for t in outputs
        if t is not None
    ]
    shaped = [t[0] for t in found if t is not None]
    return torch.stack([padded(t, tokens) for t in shaped]) if len(shaped) == len(outputs) else None
