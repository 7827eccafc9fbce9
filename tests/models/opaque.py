"""Small networks with what a dataflow may not show: fused kernels, checkpoints, casts, writes in place, other lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS, BATCH, DEPTH = 16, 5, 3, 3


class Kernel(NamedTuple):
    """One network, and what should be read of it next to its states."""

    name: str
    make: Callable[[], nn.Module]
    casts: tuple[torch.dtype, ...] = ()  # of the state
    further: int = 0  # memories


class Blocks(nn.Module):
    """An embedding, blocks, and a head; ``step`` makes the next state of one and a block."""

    def __init__(
        self, block: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)
        self.step = step or (lambda block, x: x + block(x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.step(block, x)
        return self.head(self.norm(x))


class Mlp(nn.Module):
    """The branch that all networks have, with a norm of some kind before it."""

    def __init__(self, norm: Callable[[nn.Module, Tensor], Tensor] | None = None):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.norm = norm or (lambda module, x: F.layer_norm(x, (WIDTH,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(self, x))))


class Attention(nn.Module):
    """Attention by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,))).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Doubled(torch.autograd.Function):
    """Twice a value, by a function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Unseen(torch.autograd.Function):
    """A sum that a kernel writes, of which no operation is seen: as Triton's kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.detach().numpy()[...] = x.detach().numpy() + y.detach().numpy()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class UnseenGelu(torch.autograd.Function):
    """An activation that a kernel writes, of which no operation is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.detach().numpy()[...] = np.tanh(x.detach().numpy())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class FromNumpy(UnseenGelu):
    """An activation whose memory PyTorch did not make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))


@torch.library.custom_op("depthscope_tests::fused_add", mutates_args=())
def fused_add(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """A sum in one operation that nobody knows."""
    return x + scale * y


@torch.library.custom_op("depthscope_tests::add_into", mutates_args=("x",))
def add_into(x: Tensor, y: Tensor) -> None:
    """A sum that is written into what it takes."""
    x.add_(y)


@torch.library.custom_op("depthscope_tests::clone", mutates_args=())
def misnamed(x: Tensor) -> Tensor:
    """The features in reverse, under the name of a copy."""
    return x.flip(-1)


@torch.library.custom_op("depthscope_tests::gelu", mutates_args=())
def custom_gelu(x: Tensor) -> Tensor:
    """An activation inside of a branch that nobody knows."""
    return F.gelu(x)


class Experts(nn.Module):
    """Experts whose outputs are added to the tokens that chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(Mlp() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weight, chosen = self.route(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero().squeeze(-1)
            out.index_add_(0, at, expert(flat[at]) * weight[at, None])
        return out.view_as(x)


class DropPath(nn.Module):
    """A branch that is left out for some sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        keep = x.new_empty(len(x), 1, 1).bernoulli_(0.5).div_(0.5)
        return self.mlp(x) * keep


class Masked(nn.Module):
    """Padding is set to zero in the state after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        mask[:, -1] = False
        return (x + self.mlp(x)).masked_fill(~mask[..., None], 0.0)


class WithClass(Blocks):
    """A token of its own is joined in front of the others."""

    def __init__(self) -> None:
        super().__init__(Mlp)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(ids), -1, -1), self.embed(ids)], 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)[:, 0])


class Merging(Blocks):
    """Neighbouring tokens are merged between two stages."""

    def __init__(self) -> None:
        super().__init__(Mlp)
        self.merge = nn.Linear(2 * WIDTH, WIDTH)
        self.later = nn.ModuleList(Mlp() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        x = self.merge(x[:, :4].reshape(len(x), 2, 2 * WIDTH))
        for block in self.later:
            x = x + block(x)
        return self.head(self.norm(x))


class Cached(nn.Module):
    """Attention over what earlier calls left in a cache, into which the present tokens are written."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("keys", torch.randn(BATCH, 9, WIDTH))
        self.register_buffer("values", torch.randn(BATCH, 9, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        with torch.no_grad():
            self.keys[:, 4 : 4 + TOKENS] = k
            self.values[:, 4 : 4 + TOKENS] = v
        return self.out((q @ self.keys.mT).softmax(-1) @ self.values)


class Tied(Blocks):
    """One block for all depths, and the embedding's weight for the head."""

    def __init__(self) -> None:
        super().__init__(Mlp)
        self.blocks = nn.ModuleList([self.blocks[0]] * DEPTH)
        self.head.weight = self.embed.weight


class Nested(Blocks):
    """The state is a list in a dict that blocks hand on."""

    def forward(self, ids: Tensor) -> Tensor:
        held = {"x": [self.embed(ids)]}
        for block in self.blocks:
            held = {"x": [held["x"][0] + block(held["x"][0])]}
        return self.head(self.norm(held["x"][0]))


def in_place(block: nn.Module, x: Tensor) -> Tensor:
    """The sum is written over the state's copy."""
    x = x.clone()
    x += block(x)
    return x


def in_place_of_a_library(block: nn.Module, x: Tensor) -> Tensor:
    """A library's operation writes the sum over the state's copy."""
    out = x.clone()
    add_into(out, block(x))
    return out


def in_views(block: nn.Module, x: Tensor) -> Tensor:
    """Each half of the features is written by itself, through a view."""
    y, out = block(x), x.clone()
    out[..., : WIDTH // 2].add_(y[..., : WIDTH // 2])
    out[..., WIDTH // 2 :].add_(y[..., WIDTH // 2 :])
    return out


def some_tokens(block: nn.Module, x: Tensor) -> Tensor:
    """Only the earlier tokens are computed by the block: others are added nothing."""
    return x + F.pad(block(x[:, : TOKENS - 1]), (0, 0, 0, 1))


def autocast(block: nn.Module, x: Tensor) -> Tensor:
    """The branch is computed in half precision by autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    return x + y


def cast(block: nn.Module, x: Tensor) -> Tensor:
    """The state is cast to half precision and back between two blocks."""
    return (x + block(x)).bfloat16().float()


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """Every block is a checkpoint."""
    return lambda block, x: checkpoint(lambda of: of + block(of), x, use_reentrant=reentrant)


def quantised() -> nn.Module:
    """Linear layers with weights of 8 bits."""
    return torch.ao.quantization.quantize_dynamic(Blocks(Mlp).eval(), {nn.Linear}, dtype=torch.qint8)


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The kernel of torch."""
    return F.rms_norm(x, (WIDTH,), module.gain)


def written_norm(module: nn.Module, x: Tensor) -> Tensor:
    """A norm in single operations."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * module.gain


def post_norm(block: nn.Module, x: Tensor) -> Tensor:
    """The norm of the sum is the state."""
    return F.layer_norm(x + block(x), (WIDTH,), block.gain)


class Activated(Mlp):
    """A branch that ends with an activation of one's own."""

    def __init__(self, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


KERNELS = [
    Kernel("fused attention", lambda: Blocks(Attention)),
    Kernel("layer_norm kernel", lambda: Blocks(Mlp)),
    Kernel("rms_norm kernel", lambda: Blocks(lambda: Mlp(rms_norm))),
    Kernel("norm in single operations", lambda: Blocks(lambda: Mlp(written_norm))),
    Kernel("norm of the state", lambda: Blocks(Mlp, post_norm)),
    Kernel("autograd function in a branch", lambda: Blocks(Mlp, lambda b, x: x + Doubled.apply(b(x)))),
    Kernel("autograd function on the state", lambda: Blocks(Mlp, lambda b, x: Doubled.apply(x) + b(x))),
    Kernel("library operation in a branch", lambda: Blocks(lambda: Activated(custom_gelu))),
    Kernel("kernel in a branch", lambda: Blocks(lambda: Activated(UnseenGelu.apply))),
    Kernel("quantised weights", quantised),
    Kernel("checkpoints", lambda: Blocks(Mlp, checkpointed(False))),
    Kernel("reentrant checkpoints", lambda: Blocks(Mlp, checkpointed(True))),
    Kernel("autocast", lambda: Blocks(Mlp, autocast)),
    Kernel("casts of the state", lambda: Blocks(Mlp, cast), casts=(torch.bfloat16,)),
    Kernel("sums in place", lambda: Blocks(Mlp, in_place)),
    Kernel("sums through views", lambda: Blocks(Mlp, in_views)),
    Kernel("index_add of experts", lambda: Blocks(Experts)),
    Kernel("tied blocks and head", Tied),
    Kernel("cache of keys", lambda: Blocks(Cached)),
    Kernel("class token", WithClass),
    Kernel("patch merging", Merging, further=1),
    Kernel("masked padding", lambda: Blocks(Masked, lambda b, x: b(x))),
    Kernel("DropPath", lambda: Blocks(DropPath).train()),
    Kernel("branches of some tokens", lambda: Blocks(Mlp, some_tokens)),
    Kernel("state in a dict", lambda: Nested(Mlp)),
]
# Read with gradients alone: without these nothing shows from what they were computed.
WITH_GRADIENTS = [Kernel("memory of numpy in a branch", lambda: Blocks(lambda: Activated(FromNumpy.apply)))]
REFUSED = [
    Kernel("library operation that adds", lambda: Blocks(Mlp, lambda b, x: fused_add(x, b(x), 0.5))),
    Kernel("library operation that adds in place", lambda: Blocks(Mlp, in_place_of_a_library)),
    Kernel("kernel that adds", lambda: Blocks(Mlp, lambda b, x: Unseen.apply(x, b(x)))),
]
