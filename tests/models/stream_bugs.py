"""Stream connections with one bug each, in three call styles, and their right twins, which differ in the bug alone.

Styles: a module *returns* its weights, as transformers' ``deepseek_v4``; the block's own code computes them as *local*
variables, as DeepSeek's inference code; one method opens the connection and another closes it (*paired*), as in the package
hyper-connections. Shapes: B batch, T token, n stream, D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY, WIDTH, LAYERS = 48, 16, 3
STYLES = ("returned", "local", "paired")
BUGS = (
    "discarded",
    "transposed",
    "transposed_once",
    "ones",
    "passing",
    "uniform",
    "detached",
    "swapped",
    "first_state",
    "stale",
    "other_token",
)


@dataclass(frozen=True)
class Wiring:
    """How a network is wired; `bug` is empty for the right twin.

    Parameters
    ----------
    style : str
        One of STYLES.
    bug : str
        One of BUGS, or "".
    streams : int
        n.
    dynamic : bool
        Whether the coefficients depend on the streams, or on parameters alone.
    logits : str
        "random", or "zero" for the initialisation at which every H_res is uniform.
    spread : float
        Standard deviation of random logits; where it is large, 20 rounds of Sinkhorn leave an error in one sum.
    custom : bool
        Whether Sinkhorn is an autograd function that runs its rounds without a graph, as that of Megatron-Core does.
    copies : bool
        Whether the streams begin as copies: then no gradient of the first matrix is left, whose rows sum to 1.
    """

    style: str = "returned"
    bug: str = ""
    streams: int = 4
    dynamic: bool = True
    logits: str = "random"
    spread: float = 1.0
    custom: bool = False
    copies: bool = False


def sinkhorn(logits: torch.Tensor, rounds: int = 20) -> torch.Tensor:
    """Columns, then rows: the sums over the sources (the last axis) are exact."""
    matrix = (logits - logits.amax((-1, -2), keepdim=True)).exp()
    for _ in range(rounds):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


class SinkhornFunction(torch.autograd.Function):
    """The rounds without a graph; the backward runs them once more with one."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return sinkhorn(logits)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            logits = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(sinkhorn(logits), logits, gradient)[0]


def along_size_one(logits: torch.Tensor, rounds: int = 20) -> torch.Tensor:
    """The bug: every number is its own row, (…, n·n, 1), and is divided by itself at the end."""
    flat = (logits - logits.amax((-1, -2), keepdim=True)).exp().flatten(-2).unsqueeze(-1)
    for _ in range(rounds):
        flat = flat / flat.sum(-2, keepdim=True)
        flat = flat / flat.sum(-1, keepdim=True)
    return flat.reshape(logits.shape)


CONSTRAINTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ones": along_size_one,
    "detached": lambda logits: sinkhorn(logits.detach()),
}


class Coefficients(nn.Module):
    """H_pre (B, T, n), H_res (B, T, n, n; destination by source) and H_post (B, T, n) of streams (B, T, n, D)."""

    def __init__(self, wiring: Wiring, number: int):
        super().__init__()
        n, zero = wiring.streams, wiring.logits == "zero"
        self.wiring, self.number = wiring, number
        size = n * n + 2 * n
        base = torch.zeros(size) if zero else torch.randn(size)
        if not zero:
            # Around the identity, so that the streams stay different over a few connections.
            base[2 * n :] = (wiring.spread * torch.randn(n, n) + 2 * torch.eye(n)).flatten()
        self.base = nn.Parameter(base)
        if wiring.dynamic:
            self.project = nn.Linear(n * WIDTH, size, bias=False)
            self.scale = nn.Parameter(torch.full((3,), 0.0 if zero else 1.0))

    def forward(self, x):
        n = self.wiring.streams
        base = self.base.float().expand(*x.shape[:2], -1)
        raw, scale = torch.zeros_like(base), torch.zeros(3)
        if self.wiring.dynamic:
            flat = x.flatten(2).float()
            flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
            raw, scale = nn.functional.linear(flat, self.project.weight.float()), self.scale.float()
        parts = zip(raw.split([n, n, n * n], -1), base.split([n, n, n * n], -1), scale, strict=True)
        pre, post, logits = (part * factor + bias for part, bias, factor in parts)
        constrain = CONSTRAINTS.get(
            self.wiring.bug, SinkhornFunction.apply if self.wiring.custom else sinkhorn
        )
        return torch.sigmoid(pre), constrain(logits.unflatten(-1, (n, n))), 2 * torch.sigmoid(post)


def mixed(wiring: Wiring, number: int, res: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What becomes of the streams apart from the branch: H_res X in float32, or what a bug makes of it."""
    if wiring.bug == "discarded":
        return x
    if wiring.bug == "transposed" or (wiring.bug == "transposed_once" and number == 3):
        res = res.mT
    return res @ x


def read(wiring: Wiring, pre: torch.Tensor, post: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """H_pre X."""
    weights = post if wiring.bug == "swapped" else pre
    return torch.einsum("btn,btnd->btd", weights.float(), x.float()).to(x.dtype)


def written(wiring: Wiring, pre: torch.Tensor, post: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """H_post ⊗ F."""
    weights = pre if wiring.bug == "swapped" else post
    return torch.einsum("btn,btd->btnd", weights.float(), out.float()).to(out.dtype)


def source(wiring: Wiring, x: torch.Tensor, first: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """What the coefficients are computed from: the streams, or what a bug takes for them."""
    if wiring.bug == "first_state":
        return first
    if wiring.bug == "stale":
        return previous
    return x.roll(1, 1) if wiring.bug == "other_token" else x


class Branch(nn.Module):
    """A feed-forward branch after a norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        return self.net(self.norm(x))


class Returning(nn.Module):
    """A connection that returns its weights: (H_post, H_res, branch input)."""

    def __init__(self, wiring: Wiring, number: int):
        super().__init__()
        self.wiring, self.coefficients = wiring, Coefficients(wiring, number)

    def forward(self, x, origin):
        pre, res, post = self.coefficients(origin)
        if self.wiring.bug == "swapped":
            return pre, res, read(self.wiring, pre, post, x)
        return post, res, read(self.wiring, pre, post, x)


class ReturnedStep(nn.Module):
    """One sublayer: the connection is a module, the merge is the block's code."""

    def __init__(self, wiring: Wiring, number: int):
        super().__init__()
        self.wiring, self.number = wiring, number
        self.connection, self.branch = Returning(wiring, number), Branch()

    def step(self, x, first, previous):
        write, res, taken = self.connection(x, source(self.wiring, x, first, previous))
        out = torch.einsum("btn,btd->btnd", write.float(), self.branch(taken).float())
        return mixed(self.wiring, self.number, res, x) + out.to(x.dtype)


class LocalStep(nn.Module):
    """One sublayer whose weights are local variables of the block's code."""

    def __init__(self, wiring: Wiring, number: int):
        super().__init__()
        self.wiring, self.number = wiring, number
        self.coefficients, self.branch = Coefficients(wiring, number), Branch()

    def step(self, x, first, previous):
        # The method and not the module: no hook sees what it returns.
        pre, res, post = self.coefficients.forward(source(self.wiring, x, first, previous))
        out = self.branch(read(self.wiring, pre, post, x))
        return mixed(self.wiring, self.number, res, x) + written(self.wiring, pre, post, out)


class Pair(nn.Module):
    """A connection that one method opens and another one closes, with one matrix α (source by 1 + destination)."""

    def __init__(self, wiring: Wiring, number: int):
        super().__init__()
        self.wiring, self.number, self.num_residual_streams = wiring, number, wiring.streams
        self.coefficients = Coefficients(wiring, number)

    def width_connection(self, x, first, previous):
        pre, res, post = self.coefficients.forward(source(self.wiring, x, first, previous))
        if self.wiring.bug == "swapped":
            pre, post = post, pre
        alpha = torch.cat([pre.unsqueeze(-1), res.mT], -1)  # source by (read, destination)
        taken = torch.einsum("bts,btsd->btd", alpha[..., 0], x.float())
        rest = mixed(self.wiring, self.number, alpha[..., 1:].mT, x)
        return taken.to(x.dtype), rest, {"beta": post}

    def depth_connection(self, out, rest, *, beta):
        return torch.einsum("btd,btn->btnd", out.float(), beta.float()).to(out.dtype) + rest


class PairedStep(nn.Module):
    """One sublayer between the two methods of a connection."""

    def __init__(self, wiring: Wiring, number: int):
        super().__init__()
        self.pair, self.branch = Pair(wiring, number), Branch()

    def step(self, x, first, previous):
        taken, rest, weights = self.pair.width_connection(x, first, previous)
        return self.pair.depth_connection(self.branch(taken), rest, **weights)


STEPS = {"returned": ReturnedStep, "local": LocalStep, "paired": PairedStep}


class Block(nn.Module):
    """Two sublayers."""

    def __init__(self, wiring: Wiring, layer: int):
        super().__init__()
        self.wiring = wiring
        step = STEPS[wiring.style]
        self.attention, self.mlp = step(wiring, 2 * layer), step(wiring, 2 * layer + 1)

    def forward(self, x, first, previous):
        if self.wiring.bug == "passing":
            x = x.unsqueeze(2).expand(-1, -1, self.wiring.streams, -1)
        middle = self.attention.step(x, first, previous)
        after = self.mlp.step(middle, first, x)
        if self.wiring.bug == "passing":
            return after.mean(2)
        return after


class Network(nn.Module):
    """Streams that begin as copies of the embedding, shifted each by its own vector, and end in their mean."""

    def __init__(self, wiring: Wiring, layers: int = LAYERS):
        super().__init__()
        self.wiring = wiring
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        shift = 0.0 if wiring.logits == "zero" or wiring.copies else 0.5
        self.offsets = nn.Parameter(shift * torch.randn(wiring.streams, WIDTH))
        self.blocks = nn.ModuleList(Block(wiring, layer) for layer in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        if self.wiring.bug == "passing":
            for block in self.blocks:
                x = block(x, x, x)
            return self.head(x)
        x = x.unsqueeze(2) + self.offsets
        first = previous = x
        for block in self.blocks:
            x, previous = block(x, first, previous), x
        return self.head(x.mean(2))


def network(wiring: Wiring, seed: int = 0) -> Network:
    """A network in eval mode, the same each time."""
    torch.manual_seed(seed)
    return Network(wiring).eval()


def tokens(sequences: int = 3, length: int = 7) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(1, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))
