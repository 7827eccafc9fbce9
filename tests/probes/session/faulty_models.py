"""Small models that write down, by themselves, what passes through them: the measure of what a probe says.

Each has what one more forward would change (dropout, a batch norm, a count of calls), and a place in the middle of its
forward where a test may act.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hyper_connections import manifold_constrained_hyper_connections as constrained
from torch import nn

VOCABULARY, WIDTH, STREAMS = 32, 8, 2


@dataclass
class Notes:
    """What a model met; copies of a model write into notes of their own."""

    forwards: list[dict[int, float]] = field(
        default_factory=list
    )  # depth to the states' square norm, complete ones
    states: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def __deepcopy__(self, memo: object) -> Notes:
        return Notes()

    def __reduce__(self) -> tuple[type[Notes], tuple[()]]:
        return Notes, ()


class Noted(nn.Module):
    """A model whose forward notes its states in the order of depth."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()
        self.midway: Callable[[torch.Tensor], torch.Tensor | None] | None = None  # runs once, in the middle

    def note(self, depth: int, x: torch.Tensor, noted: dict[int, float], real: torch.Tensor | None) -> None:
        self.notes.states.append(weakref.ref(x))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # inside of vmap and grad a number cannot be read
        with torch.no_grad():
            values = x.detach().double()
            if real is not None:
                values = torch.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), values, 0.0)
            noted[depth] = float(values.square().sum())

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)

    def through(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The blocks one after another, each state noted."""
        noted, real = {}, None if attention_mask is None else attention_mask.bool()
        self.note(0, x, noted, real)
        for number, block in enumerate(self.blocks):
            x = self.run(block, x)
            self.note(number + 1, x, noted, real)
            if number == 1:
                x = self.act(x)
        self.notes.forwards.append(noted)
        return x

    def act(self, x: torch.Tensor) -> torch.Tensor:
        if self.midway is None:
            return x
        midway, self.midway = self.midway, None
        changed = midway(x)
        return x if changed is None else changed


class Block(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.3))
        self.calls: list[int] = []

    def forward(self, x):
        self.calls.append(1)
        normed = self.norm(x.transpose(1, 2)).transpose(1, 2) if x.numel() else x
        return x + self.inner(normed)


class Plain(Noted):
    def __init__(self, layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, attention_mask=None):
        return self.head(self.through(self.embed(ids), attention_mask))


class Connection(nn.Module):
    """A connection that returns its weights, with dropout: computing it once more would draw other random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(WIDTH, 1)
        self.mix = nn.Parameter(torch.eye(STREAMS) + 0.2 * torch.randn(STREAMS, STREAMS))
        self.write = nn.Parameter(1 + 0.2 * torch.randn(STREAMS))
        self.drop = nn.Dropout(0.2)
        self.count = 0

    def forward(self, x):
        self.count += 1
        lead = x.shape[:2]
        read = self.drop(torch.sigmoid(self.read(x)).squeeze(-1))
        collapsed = torch.einsum("btn,btnd->btd", read, x)
        return self.write.expand(*lead, STREAMS), self.mix.expand(*lead, STREAMS, STREAMS), collapsed


class StreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.connection, self.branch = (
            Connection(),
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
        )

    def forward(self, x):
        write, mix, read = self.connection(x)
        return mix @ x + write[..., None] * self.branch(read)[:, :, None]


class Streams(Plain):
    """Hyper-connections whose modules return their weights."""

    def __init__(self, layers: int = 4):
        super().__init__(layers)
        self.blocks = nn.ModuleList(StreamBlock() for _ in range(layers))
        self.offsets = nn.Parameter(torch.randn(STREAMS, WIDTH))

    def forward(self, ids, attention_mask=None):
        return self.head(self.through(self.embed(ids)[:, :, None] + self.offsets, attention_mask).mean(2))


class Opened(Noted):
    """mHC whose connections are opened and closed around their branch by methods of one module."""

    def __init__(self, layers: int = 4):
        super().__init__()
        init, self.expand, self.reduce = constrained.get_init_and_expand_reduce_stream_functions(
            STREAMS, dim=WIDTH, disable=False
        )
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        branches = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(layers)]
        self.blocks = nn.ModuleList(init(branch=branch) for branch in branches)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, attention_mask=None):
        mask = None if attention_mask is None else attention_mask.repeat_interleave(STREAMS, 0)
        return self.head(self.reduce(self.through(self.expand(self.embed(ids)), mask)))


MODELS: dict[str, Callable[[], Noted]] = {
    "plain": Plain,
    "hc": Streams,
    "mhc": Opened,
}
