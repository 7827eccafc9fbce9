"""How are raw sequences put together whose tokens are spread over processes? Their parts are put into one vector and added.

A number that is zero in all processes but one is that number after the addition, bit for bit (a negative zero becomes zero).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from collections.abc import Sequence as Many

import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.sequence_shards import TokenShards
from depthscope.probes.session.reservoir import Sequence

FIELDS = ("mask", "states", "gradients", "branches")  # of a sequence; the token is their first axis
EXACT_INTEGERS = 2**24  # of float32


def parts_vector(sequences: Many[Sequence], shards: TokenShards) -> torch.Tensor:
    """The tokens of this process at their places in the complete sequences, float32, and a digest of what has which shape.

    ``sequences``: those of which this process has a part, in an order that all processes share.
    Returns: Zeros at the tokens of the other processes; at its end one digest a process.
    """
    vectors, shapes = [], []
    for sequence, name, key, part, length in _tensors(sequences):
        tensor = getattr(sequence, name)[key].float()
        whole = torch.zeros(length, *tensor.shape[1:])
        whole[part] = tensor
        vectors.append(whole.reshape(-1))
        shapes.append(f"{sequence.index} {name} {key} {tuple(whole.shape)}")
    digests = torch.zeros(len(shards.ranks))
    digests[shards.position] = _digest(shapes)
    return torch.cat([*vectors, digests])


def _digest(shapes: Many[str]) -> int:
    return 1 + zlib.crc32("; ".join(shapes).encode()) % (EXACT_INTEGERS - 1)


def _tensors(
    sequences: Many[Sequence],
) -> Iterator[tuple[Sequence, str, int | tuple[int, int], slice, int]]:
    """Every tensor of which this process has a part: its sequence, field and key, the part, and the full length."""
    for sequence in sequences:
        assert sequence.part is not None
        for name in FIELDS:
            for key in sorted(getattr(sequence, name)):
                yield sequence, name, key, *sequence.part


def put_together(sequences: Many[Sequence], joined: torch.Tensor, num_processes: int) -> None:
    """Take over complete sequences in place of their parts.

    ``sequences``: as they were given to `parts_vector`; they are changed.
    Raises CaptureError: Where some process had no part, or one of other sequences.
    """
    at, shapes, whole = 0, [], []
    for sequence, name, key, _, length in _tensors(sequences):
        known = getattr(sequence, name)[key]
        shape = torch.Size((length, *known.shape[1:]))
        shapes.append(f"{sequence.index} {name} {key} {tuple(shape)}")
        whole.append((sequence, name, key, joined[at : at + shape.numel()].reshape(shape).to(known.dtype)))
        at += shape.numel()
    digests = joined[at : at + num_processes].tolist()
    if digests != [_digest(shapes)] * num_processes:
        raise CaptureError(
            "the processes that share sequences did not sample the same ones; expected one batch for all of them, and tokens "
            "for each"
        )
    for sequence, name, key, tensor in whole:
        getattr(sequence, name)[key] = tensor.clone()
