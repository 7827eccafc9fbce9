"""What do the study's models read? Bytes of one text, its last tenth held out, in random windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and a held-out end of the same text; both (num_bytes,) int64."""

    train: torch.Tensor
    held_out: torch.Tensor

    @property
    def unigram_entropy(self) -> float:
        """Loss, in nats per byte, of a model that knows only how frequent each held-out byte is.

        A trained model that does not beat it has learned nothing about sequences.
        """
        counts = torch.bincount(self.held_out).double()
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * frequencies.log()).sum())


def split_corpus(text: str) -> Corpus:
    """Cut a text into training bytes and a held-out end, a tenth."""
    ids = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))
    # The end and not random windows: neighbouring windows of a text share words, and the loss would leak.
    border = len(ids) - len(ids) // 10
    return Corpus(ids[:border], ids[border:])


def draw_batch(ids: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows, one byte longer than the predictions made on them.

    ``batch, length``: number of windows, and of the predictions in each.
    """
    # The last start leaves room for length + 1 bytes: `high` itself is never drawn.
    starts = torch.randint(0, len(ids) - length, (batch, 1), generator=generator)
    return ids[starts + torch.arange(length + 1)]
