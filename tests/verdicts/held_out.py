"""Small networks that are trained for at most 200 steps, on text or digits, in which `mistakes` are made.

Shapes: B batch, T token, n stream, D feature.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from depthscope import probes

WIDTH, VOCABULARY, LENGTH = 48, 64, 32


# --- data ---


@cache
def characters() -> torch.Tensor:
    """Text as numbers below VOCABULARY: the commonest characters, and one for all others."""
    folder = Path(random.__file__).parent
    text = "".join((folder / f"{name}.py").read_text("utf-8") for name in ("argparse", "textwrap", "random"))
    common = sorted(set(text), key=text.count, reverse=True)[: VOCABULARY - 1]
    return torch.tensor([common.index(each) + 1 if each in common else 0 for each in text])


def prose(count: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    starts = torch.randint(len(characters()) - LENGTH, (count,), generator=rng)
    return {"ids": torch.stack([characters()[start : start + LENGTH] for start in starts.tolist()])}


@cache
def all_digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)


def digits(count: int, rng: torch.Generator, classes: int = 10, pixels: int = 64) -> dict[str, torch.Tensor]:
    images, labels = all_digits()
    known = torch.nonzero(labels < classes)[:, 0]
    chosen = known[torch.randint(len(known), (count,), generator=rng)]
    return {"images": images[chosen][:, :pixels], "labels": labels[chosen]}


# --- networks ---


@dataclass
class Shape:
    """What a network is made of."""

    blocks: int = 5
    norm: str = "pre"
    gated: bool = False
    rms: bool = False
    qk: bool = False
    dropout: float = 0.0
    scale: float | None = None
    parallel: bool = False
    causal: bool = True
    experts: int = 0
    streams: int = 1
    mixing: str = "mhc"
    dynamic: float = 0.1
    classes: int = 0
    patch: int = 4
    mixer: str = "attention"
    tied: bool = False
    embedding: float = 0.5
    start: str = "apart"


class Attention(nn.Module):
    """Four heads."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH // 4) if shape.qk else nn.Identity() for _ in range(2))
        self.causal, self.temperature, self.drop = shape.causal, 1.0, nn.Dropout(shape.dropout)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        scores = self.temperature * self.q_norm(q) @ self.k_norm(k).mT / math.sqrt(WIDTH // 4)
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        return self.drop(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two layers, gated or not."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3 * WIDTH) if shape.gated else None
        self.up, self.down, self.drop = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(3 * WIDTH, WIDTH),
            nn.Dropout(shape.dropout),
        )

    def forward(self, x):
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.drop(self.down(hidden))


class Moe(nn.Module):
    """The best of some experts for each token, times its probability."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.router = nn.Linear(WIDTH, shape.experts, bias=False)
        self.experts = nn.ModuleList(Mlp(shape) for _ in range(shape.experts))
        self.bias = torch.zeros(shape.experts)

    def forward(self, x):
        flat = x.flatten(0, 1)
        share = self.router(flat).softmax(-1)
        best = (share + self.bias).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(best == number)[:, 0]
            out = out.index_add(0, rows, share[rows, number, None] * expert(flat[rows]))
        return out.view_as(x)


class TokenMixer(nn.Module):
    """An MLP over the tokens."""

    def __init__(self, tokens: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))

    def forward(self, x):
        return self.net(x.mT).mT


def same(x: Any) -> Any:
    return x


class Mixing(nn.Module):
    """H_pre, H_res and H_post of one connection."""

    def __init__(self, shape: Shape, number: int):
        super().__init__()
        n = shape.streams
        self.kind, self.n, self.edit = shape.mixing, n, same
        start = torch.eye(n) if self.kind == "hc" else 3.5 * torch.eye(n) + 0.3 * torch.randn(n, n)
        self.res = nn.Parameter(start)
        self.pre = nn.Parameter(torch.eye(n)[number % n] if self.kind == "hc" else 0.3 * torch.randn(n))
        self.post = nn.Parameter(torch.ones(n) if self.kind == "hc" else 0.3 * torch.randn(n))
        self.project = nn.Linear(n * WIDTH, n * (n + 2), bias=False)
        nn.init.normal_(self.project.weight, std=0.02)
        self.norm, self.scale = nn.RMSNorm(n * WIDTH), nn.Parameter(torch.tensor(shape.dynamic))
        self.rounds = 20

    def forward(self, x):
        moved = self.scale * self.project(self.norm(x.flatten(2)))
        pre, post, res = moved.split([self.n, self.n, self.n**2], -1)
        pre, post, res = self.pre + pre, self.post + post, self.res + res.unflatten(-1, (self.n, self.n))
        if self.kind == "mhc":
            pre, post = pre.sigmoid(), 2 * post.sigmoid()
            for _ in range(self.rounds):
                res = res.log_softmax(-2).log_softmax(-1)
            res = res.exp()
        return self.edit((pre, post, res))


class Block(nn.Module):
    """A mixer of tokens and a transform, on one state or on streams."""

    def __init__(self, shape: Shape, number: int, tokens: int):
        super().__init__()
        first = Attention(shape) if shape.mixer == "attention" else TokenMixer(tokens)
        self.branches = nn.ModuleList([first, Moe(shape) if shape.experts else Mlp(shape)])
        norm = nn.RMSNorm if shape.rms else nn.LayerNorm
        self.norms = nn.ModuleList(nn.Identity() if shape.norm == "none" else norm(WIDTH) for _ in range(2))
        self.outer = nn.ModuleList(
            norm(WIDTH) if shape.norm == "sandwich" else nn.Identity() for _ in range(2)
        )
        self.scales = None
        if shape.scale is not None:
            self.scales = nn.ParameterList(torch.full((WIDTH,), shape.scale) for _ in range(2))
        self.mixings = None
        if shape.streams > 1:
            self.mixings = nn.ModuleList(Mixing(shape, 2 * number + i) for i in range(2))
        self.shape, self.before, self.after, self.strength = shape, same, same, 1.0

    def branch(self, i: int, x):
        out = self.outer[i](self.branches[i](self.norms[i](x))) * self.strength
        return out if self.scales is None else self.scales[i] * out

    def forward(self, x):
        x = self.before(x)
        if self.mixings is not None:
            for i in range(2):
                pre, post, res = self.mixings[i](x)
                read = torch.einsum("btn,btnd->btd", pre, x)
                x = res @ x + post.unsqueeze(-1) * self.branch(i, read).unsqueeze(2)
        elif self.shape.norm == "post":
            for i in range(2):
                x = self.norms[i](x + self.branches[i](x))
        elif self.shape.parallel:
            x = x + self.branch(0, x) + self.branch(1, x)
        else:
            for i in range(2):
                x = x + self.branch(i, x)
        return self.after(x)


class Network(nn.Module):
    """Text or digits in, logits out."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        if shape.classes:
            tokens = 64 // shape.patch if shape.patch < 64 else 1
            self.embed = nn.Linear(shape.patch, WIDTH)
        else:
            tokens, self.embed = LENGTH, nn.Embedding(VOCABULARY, WIDTH)
            nn.init.normal_(self.embed.weight, std=shape.embedding)
        self.place = nn.Parameter(0.2 * shape.embedding * torch.randn(tokens, WIDTH))
        self.blocks = nn.ModuleList(Block(shape, number, tokens) for number in range(shape.blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, shape.classes or VOCABULARY)
        if shape.tied:
            self.head.weight = self.embed.weight
        self.offsets = nn.Parameter(
            (0.3 if shape.start == "apart" else 0.0) * torch.randn(shape.streams, WIDTH)
        )

    def forward(self, x):
        x = x.unflatten(1, (-1, self.shape.patch)) if self.shape.classes else x
        x = self.embed(x) + self.place[: x.shape[1]]
        x = x.unsqueeze(2) + self.offsets if self.shape.streams > 1 else x
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.mean(2) if self.shape.streams > 1 else x)
        return self.head(x.mean(1)) if self.shape.classes else self.head(x)


class ConvNet(nn.Module):
    """A ResNet of one stage with batch norms."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock() for _ in range(shape.blocks))
        self.head = nn.Linear(WIDTH, shape.classes)

    def forward(self, x):
        x = self.stem(x.unflatten(1, (1, 8, 8)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ConvBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH),
        )  # fmt: skip

    def forward(self, x):
        return (x + self.net(x)).relu()


# --- training and measuring ---


def loss_of(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "labels" in batch:
        return F.cross_entropy(output, batch["labels"])
    return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), batch["ids"][:, 1:].flatten())


def call(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    return model(batch["images"] if "images" in batch else batch["ids"])


class Called(nn.Module):
    """A model that takes the batch by name, as a data loader gives it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return call(self.model, batch)


@dataclass
class Recipe:
    """How one network is made, trained and looked at."""

    title: str
    shape: Shape = field(default_factory=Shape)
    data: Callable[..., dict[str, torch.Tensor]] = prose
    steps: int = 150
    rate: float = 2e-3
    decay: float = 0.01
    optimizer: str = "adamw"
    build: Callable[[Shape], nn.Module] = Network
    before: Callable[[Any], Any] = same
    touch: Callable[[Any], Any] = same
    look: Callable[..., dict[str, torch.Tensor]] | None = None
    record: int = 0
    found_by: tuple[str, ...] = ()
    sequences: int = 8


def train(model: nn.Module, recipe: Recipe, rng: torch.Generator) -> None:
    kind = {
        "adamw": partial(torch.optim.AdamW, weight_decay=recipe.decay),
        "sgd": partial(torch.optim.SGD, momentum=0.9),
    }
    optimizer = kind[recipe.optimizer]([p for p in model.parameters() if p.requires_grad], lr=recipe.rate)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1.0 - 0.9 * step / max(recipe.steps, 1))
    )
    for _ in range(recipe.steps):
        batch = recipe.data(16, rng)
        optimizer.zero_grad()
        loss_of(call(model, batch), batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()


def recorded(model: nn.Module, recipe: Recipe, rng: torch.Generator) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate)
    with probes.record(model, every=5, gradients=True, weights=True) as recorder:
        for _ in range(recipe.record):
            batch = recipe.data(16, rng)
            optimizer.zero_grad()
            loss = loss_of(call(model, batch), batch)
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    return recorder.run


def run_of(recipe: Recipe, seed: int) -> Any:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = recipe.build(recipe.shape)
    recipe.before(model)
    if recipe.record:
        recipe.touch(model)
        return recorded(model, recipe, rng)
    train(model, recipe, rng)
    recipe.touch(model)
    look = recipe.look or recipe.data
    return probes.capture(Called(model).eval(), look(recipe.sequences, rng), gradients=True, loss=loss_of)
