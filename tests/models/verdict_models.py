"""Small networks that are built to show one failure each: plain stacks, and streams with connections of any weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Finding
from tests.models.plain_stack import Stack

VOCABULARY, WIDTH, STREAMS, LAYERS = 64, 32, 4, 6
CONNECTIONS = 2 * LAYERS
IDENTITY = torch.eye(STREAMS)
UNIFORM = torch.full((STREAMS, STREAMS), 1 / STREAMS)
NEAR = 0.9 * IDENTITY + 0.1 * UNIFORM  # mixes, and keeps a quarter of the differences over twelve connections

Step = Callable[..., torch.Tensor]
Merge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def tokens(sequences: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them 0, which some models take for padding."""
    drawn = torch.randint(1, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return drawn


class Attention(nn.Module):
    """Causal attention without a norm or a skip."""

    def __init__(self, width: int = WIDTH, heads: int = 4, *, causal: bool = True):
        super().__init__()
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.causal = causal

    def forward(self, x):
        hidden = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        return self.attend(x, x, x, need_weights=False, attn_mask=hidden)[0]


def feedforward(width: int = WIDTH, inner: int = 2 * WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class PreNorm(nn.Module):
    """A branch after a norm."""

    def __init__(self, branch: nn.Module, width: int = WIDTH):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), branch

    def forward(self, x):
        return self.branch(self.norm(x))


class Block(nn.Module):
    """x + attention(norm(x)), then the same with a feed-forward branch."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = PreNorm(Attention()), PreNorm(feedforward())

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Layer(nn.Module):
    """Any step as a block of a plain stack."""

    def __init__(self, step: Step, *parts: nn.Module):
        super().__init__()
        self.step, self.parts = step, nn.ModuleList(parts)

    def forward(self, x):
        return self.step(x, *self.parts)


def stack(blocks: Sequence[nn.Module]) -> Stack:
    """An embedding, blocks and a head on the last state."""
    return Stack(blocks, nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))


def pre_norm(layers: int = LAYERS) -> Stack:
    """A fresh transformer with its norms before the branches."""
    torch.manual_seed(0)
    return stack([Block() for _ in range(layers)])


def plain(make: Callable[[int], nn.Module], layers: int = LAYERS) -> Stack:
    """A stack of blocks that are made by their number."""
    torch.manual_seed(0)
    return stack([make(number) for number in range(layers)])


def prediction(output: Any, batch: Any) -> torch.Tensor:
    """Cross entropy of the next tokens."""
    ids = batch["input_ids"] if isinstance(batch, dict) else batch
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def captured(model: nn.Module, batch: Any = None, *, settle: int = 60, **options: Any) -> xr.DataTree:
    """A run with gradients, as the command `probe` makes it; ``settle``: forwards of its experiments, 0 for none."""
    batch = tokens() if batch is None else batch
    loss = options.pop("loss", prediction)
    run = probes.capture(model, batch, gradients=True, loss=loss, **options)
    read = {name: options[name] for name in ("layers", "layout", "streams", "mask") if name in options}
    return probes.settle(run, model, batch, loss=loss, forwards=settle, **read) if settle else run


def findings(run: xr.DataTree, **options: Any) -> list[Finding]:
    return diagnostics.judge(diagnostics.analyze(run), **options)


# --- streams ---


class Connection(nn.Module):
    """Static weights of one connection: reads, mixing (rows are destinations) and writes."""

    def __init__(self, read: torch.Tensor, mix: torch.Tensor, write: torch.Tensor):
        super().__init__()
        # Cloned: a caller passes one tensor to several connections, each of which learns its own.
        self.read, self.mix, self.write = (nn.Parameter(each.clone()) for each in (read, mix, write))

    def mixing(self) -> torch.Tensor:
        return self.mix

    def forward(self, x):
        lead = x.shape[:2]
        collapsed = torch.einsum("n,btnd->btd", self.read, x)
        return self.write.expand(*lead, STREAMS), self.mixing().expand(*lead, STREAMS, STREAMS), collapsed


class Constrained(Connection):
    """The same with a mixing matrix by Sinkhorn of logits; ``overshoot`` moves it away from the uniform one."""

    def __init__(self, *weights: torch.Tensor, sinkhorn_steps: int = 20, overshoot: float = 1.0):
        super().__init__(*weights)
        self.sinkhorn_steps, self.overshoot = sinkhorn_steps, overshoot

    def mixing(self) -> torch.Tensor:
        # In logs, where a normalisation is a difference: no weight underflows to zero.
        logs = self.mix
        for _ in range(self.sinkhorn_steps):
            logs = logs.log_softmax(0).log_softmax(1)
        return torch.lerp(torch.full_like(logs, 1 / STREAMS), logs.exp(), self.overshoot)


class StreamBlock(nn.Module):
    """Two branches, each within a connection, whose parts are put together by ``merge``."""

    def __init__(self, connections: Sequence[Connection], merge: Merge):
        super().__init__()
        self.attention_hc, self.mlp_hc = connections
        self.attention, self.mlp = PreNorm(Attention()), PreNorm(feedforward())
        self.merge = merge

    def forward(self, x):
        for connection, branch in ((self.attention_hc, self.attention), (self.mlp_hc, self.mlp)):
            write, mix, read = connection(x)
            x = self.merge(mix, x) + write[..., None] * branch(read)[:, :, None]
        return x


class Streams(nn.Module):
    """A language model on streams that begin as copies of the embedding, each shifted by its own vector."""

    def __init__(self, blocks: Sequence[nn.Module], *, apart: float = 0.5):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.offsets = nn.Parameter(apart * torch.randn(STREAMS, WIDTH))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)[:, :, None] + self.offsets
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2))


def mixed(mix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a connection should do to the streams."""
    return mix @ x


def streams(
    mixes: Sequence[torch.Tensor] | torch.Tensor,
    *,
    reads: Sequence[torch.Tensor] | None = None,
    writes: Sequence[torch.Tensor] | None = None,
    make: Callable[..., Connection] = Connection,
    merge: Merge = mixed,
    apart: float = 0.5,
) -> Streams:
    """Two connections a block; given mixing (or its logits), reads and writes, or random ones around an equal share."""
    torch.manual_seed(0)
    mixes = [mixes] * CONNECTIONS if isinstance(mixes, torch.Tensor) else mixes
    reads = reads or [(1 + 0.3 * torch.randn(STREAMS)) / STREAMS for _ in mixes]
    writes = writes or [1 + 0.6 * torch.randn(STREAMS) for _ in mixes]
    made = [make(*weights) for weights in zip(reads, mixes, writes, strict=True)]
    blocks = [StreamBlock(made[i : i + 2], merge) for i in range(0, len(made), 2)]
    return Streams(blocks, apart=apart)


def random_logits(spread: float, diagonal: float = 4.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [diagonal * IDENTITY + spread * torch.randn(4, 4, generator=generator) for _ in range(CONNECTIONS)]
