"""Which complete sequences are stored raw: a uniform sample of all that ran with the present weights."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from depthscope.probes.connections.proof import Weights
from depthscope.probes.model.modules import all_parameters

Stamp: TypeAlias = tuple[int, bool]
"""Which weights, see `weights_stamp`, and whether in training: its sums and samples do not mix with those of evaluations."""


@dataclass
class Sequence:
    """One stored sequence; tensors on the CPU, first axis the token."""

    index: int
    mask: dict[int, torch.Tensor]
    states: dict[tuple[int, int], torch.Tensor]
    gradients: dict[tuple[int, int], torch.Tensor]
    carried: frozenset[tuple[int, int]]  # states with a graph, whether or not their gradient arrived
    parts: dict[tuple[int, int], Weights]
    branches: dict[tuple[int, int], torch.Tensor]
    row: torch.Tensor | None  # of the model's first tensor, for the digest of the data
    decoding: bool = False
    attention: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (3, H, T) before a state


@dataclass
class Reservoir:
    """A uniform sample of sequences, restarted when the weights change: those with the lowest `rank_in_sample`.

    The rank of a sequence depends on the seed and on its number alone, so that processes that each see a part of the data draw
    what one process would draw of all: the lowest ranks of their samples together (a bottom-k sample, Cohen and Kaplan,
    doi:10.1145/1281100.1281133).

    Choosing and storing are two steps: rows are chosen when a forward begins, and its sequences replace stored ones only when
    it has ended well. Hence two stamps of the weights: those of the sequences chosen from, and those of the stored ones.
    """

    size: int  # number of stored sequences at most
    seed: int  # seed of the ranks; torch's and Python's global random states are not touched
    first: int = 0  # number of the first sequence
    seen: int = 0
    total: int = 0
    stamp: Stamp | None = None
    stored_stamp: Stamp | None = None
    stored: dict[int, Sequence] = field(default_factory=dict)  # by slot
    # A heap of (−rank, slot) of the chosen sequences: the one that is replaced next comes first.
    _chosen: list[tuple[int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        assert self.size >= 1

    def choose(self, batch_size: int, stamp: Stamp) -> dict[int, int]:
        """Choose the rows of a batch that are stored.

        ``stamp``: another one than before restarts the sample, with the same seed.
        """
        if stamp != self.stamp:
            self.stamp, self.seen, self._chosen = stamp, 0, []
        chosen: dict[int, int] = {}
        for row in range(batch_size):
            rank = rank_in_sample(self.seed, self.first + self.seen)
            self.seen += 1
            if len(self._chosen) < self.size:
                chosen[row] = len(self._chosen)
                heapq.heappush(self._chosen, (-rank, chosen[row]))
            elif rank < -self._chosen[0][0]:
                slot = self._chosen[0][1]
                heapq.heapreplace(self._chosen, (-rank, slot))
                # A later row of the same batch may take the slot of an earlier one.
                chosen = {other: taken for other, taken in chosen.items() if taken != slot}
                chosen[row] = slot
        self.total += batch_size
        return chosen

    def drawn(self, lead: torch.Tensor, batch_axis: int, stamp: Stamp) -> dict[str, Any]:
        """What a forward knows of its batch, and of its sequences that are sampled."""
        batch_size = lead.shape[batch_axis]
        slots = self.choose(batch_size, stamp)
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        return {
            "batch_size": batch_size,
            "batch_axis": batch_axis,
            "first_index": self.first + self.total - batch_size,
            "slots": slots,
            "rows": rows,
            "row_data": lead.detach().movedim(batch_axis, 0)[rows].clone(),
        }

    def forget(self) -> None:
        """Drop what was stored of the present weights, and draw anew: it was of forwards that do not count."""
        if self.stored_stamp == self.stamp:
            self.stored, self.stored_stamp = {}, None
        self.stamp = None

    def in_order(self) -> list[Sequence]:
        """The stored sequences in the order of the data; slots are in none."""
        return sorted(self.stored.values(), key=lambda sequence: sequence.index)

    def store(self, sequences: Iterable[tuple[int, Sequence]], stamp: Stamp) -> None:
        """Put complete sequences into their slots; those of earlier weights are dropped."""
        if stamp != self.stored_stamp:
            self.stored, self.stored_stamp = {}, stamp
        self.stored.update(sequences)


def rank_in_sample(seed: int, number: int) -> int:
    """A 64-bit number that decides whether a sequence is in the sample: the lowest ones are.

    Returns: Independent of the ranks of other numbers and seeds, as far as a hash is.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")


def weights_stamp(model: nn.Module) -> int:
    """A number that changes when an optimizer or a loader writes the weights, or other ones take their place.

    Returns: A hash of the parameters' identities, addresses and version counters, which torch increments at every write
    in place. Reading them costs no synchronisation with the device. A write through ``.data`` in place is not seen.
    """
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return hash(tuple(_weight_stamp(p, sharded) for p in all_parameters(model)))


def _weight_stamp(parameter: nn.Parameter, sharded: bool) -> tuple[int, int, int]:
    # Lazy parameters have a type of their own; those made in inference mode count no versions.
    plain = type(parameter) is nn.Parameter
    lazy = not plain and isinstance(parameter, nn.parameter.UninitializedTensorMixin)
    written = 0 if lazy or parameter.is_inference() else parameter._version
    if not plain or "_fsdp_flattened" in vars(parameter):
        return 0, written, 0  # FSDP makes these anew
    # FSDP gathers a parameter at another address in every forward.
    return id(parameter), written, 0 if sharded or parameter.is_meta else parameter.data_ptr()


def padded(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """A sequence's tensor (T, …) with zeros appended up to a number of tokens."""
    missing = tokens - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def token_masks(sequences: list[Sequence], number: int, depth: int = 0) -> list[np.ndarray]:
    """One mask per sequence, all as long as the longest; false on padding."""
    lengths = [sequence.states[number, depth].shape[0] for sequence in sequences]
    masks = []
    for sequence, length in zip(sequences, lengths, strict=True):
        mask = sequence.mask.get(number)
        full = np.zeros(max(lengths), dtype=bool)
        full[:length] = True if mask is None else mask.numpy()
        masks.append(full)
    return masks
