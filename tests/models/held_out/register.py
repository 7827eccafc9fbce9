"""The register of networks, their batches, and the frame of a language model around a trunk that somebody wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

WIDTH, STREAMS, VOCAB = 16, 4, 64


@dataclass(frozen=True)
class Net:
    """One network of the exam; its docstring says whose style it is."""

    kind: str
    name: str
    make: Callable[[], nn.Module]
    batch: Any

    def build(self) -> nn.Module:
        """The model, with noise on each parameter, so that none is where it was when training began."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = self.make().eval()
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model


NETS: list[Net] = []


def exam(batch: Any, make: Any = None):
    """Enters a model's class, or a trunk that ``make`` makes a model of; a number is a sequence's length."""

    def enter(written):
        words = re.sub("([a-z])([A-Z])", r"\1 \2", written.__name__.replace("_", " ")).lower()
        made, kind = partial(make, written) if make else written, written.__module__.rsplit(".", 1)[-1]
        NETS.append(Net(kind, words, made, tokens(batch) if isinstance(batch, int) else batch))
        return written

    return enter


def lm(length: int, **parts: Callable[[], Any]):
    """Enters a trunk, which is called with the model and the embedded tokens; the model has these parts."""
    return exam(length, partial(Lm, parts))


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def called(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


class Lm(nn.Module):
    """Embedding, a trunk that somebody wrote, norm and head."""

    def __init__(self, parts, trunk):
        super().__init__()
        self.embed, self.trunk = nn.Embedding(VOCAB, WIDTH), trunk
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        for name, make in parts.items():
            setattr(self, name, make())

    def forward(self, ids):
        return self.head(self.norm(self.trunk(self, self.embed(ids))))
