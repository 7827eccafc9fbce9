"""The six designs: one byte decoder joined by a residual (Pre-LN, Post-LN), HC, mHC, mHC-lite or attention over depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import nn

from depthscope.app.demo.small_lm import MLP, NUM_BYTES, Attention, LanguageOutput, Size, SmallLM, build

# Shapes: B sequences, N streams, T tokens, D features.

DESIGNS = {"residual": "Pre-LN", "post-ln": "Post-LN", "hc": "HC", "mhc": "mHC", "mhc-lite": "mHC-lite",
           "attnres": "AttnRes"}  # fmt: skip
# Of H_res at the start in the package's mHC with four streams; mHC-lite begins there too, so that only the map differs.
DIAGONAL = 0.475
# As in the mHC paper: what depends on the token begins small.
DYNAMIC_SCALE = 0.01
# Of a fresh head against variance 1/fan-in: the first loss is within 0.01 of ln 256.
HEAD_SCALE = 0.1


class PermutationConnection(nn.Module):
    """mHC-lite (2601.05732): x ← H_res x + H_postᵀ F(H_pre x), H_res a softmax mixture of all N! permutation matrices.

    ``branch``: F, with its own norm.
    ``layer_index``: taken as the package's connections take it; nothing depends on it.
    """

    matrices: torch.Tensor

    def __init__(self, streams: int, *, dim: int, branch: nn.Module, layer_index: int = 0):
        super().__init__()
        self.branch, self.streams = branch, streams
        self.norm = nn.RMSNorm(streams * dim, elementwise_affine=False)
        orders = torch.tensor(list(permutations(range(streams))))
        self.register_buffer("matrices", F.one_hot(orders, streams).float())
        start = torch.zeros(len(orders))
        # A mixture q I + (1 − q) J/N, whose other permutations all have the same weight; the identity is the first of them.
        identity = (DIAGONAL * streams - 1) / (streams - 1)
        start[0] = math.log((identity + (1 - identity) / len(orders)) / ((1 - identity) / len(orders)))
        # Each branch reads the mean of the streams and adds its output to every one: copies then act as a plain residual.
        read = torch.full((streams,), -math.log(streams - 1))
        self.sizes = (streams, streams, len(orders))
        self.static = nn.Parameter(torch.cat((read, torch.zeros(streams), start)))
        self.dynamic = nn.Parameter(torch.randn(streams * dim, sum(self.sizes)) / math.sqrt(streams * dim))
        self.scale = nn.Parameter(torch.full((3,), DYNAMIC_SCALE))

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """Carry the streams (B·N, T, D), those of a sequence next to each other, through one branch."""
        x_BTND = packed.unflatten(0, (-1, self.streams)).permute(0, 2, 1, 3)
        scale = torch.repeat_interleave(self.scale, torch.tensor(self.sizes))
        logits = self.static + scale * (self.norm(x_BTND.flatten(-2)) @ self.dynamic)
        read, write, mix = logits.split(self.sizes, dim=-1)
        h_res = torch.einsum("...p,pij->...ij", mix.softmax(-1), self.matrices)
        branch_in = torch.einsum("btn,btnd->btd", torch.sigmoid(read), x_BTND)
        mixed = torch.einsum("btij,btjd->btid", h_res, x_BTND)
        written = mixed + 2 * torch.sigmoid(write).unsqueeze(-1) * self.branch(branch_in).unsqueeze(-2)
        return written.permute(0, 2, 1, 3).flatten(0, 1)


class PostNorm(nn.Module):
    """x ← LN(x + F(x)), as the first transformers; F has no norm of its own.

    ``streams``, ``layer_index``: taken as the package's connections take them; nothing depends on them.
    """

    def __init__(self, streams: int, *, dim: int, branch: nn.Module, layer_index: int = 0):
        super().__init__()
        branch.norm = nn.Identity()
        self.branch, self.norm = branch, nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch, then normalise."""
        return self.norm(x + self.branch(x))


class DepthQuery(nn.Module):
    """Attention residuals (2603.15031): what is read is a softmax mixture of all earlier outputs.

    Keys are the outputs, normalised; the query is a learned vector, zero at the start: a plain mean.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.norm = nn.RMSNorm(width, elementwise_affine=False)

    def forward(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Mix the embedding and the outputs so far."""
        stacked = torch.stack(values)
        weights = (self.norm(stacked) @ self.query).softmax(0)
        return (weights.unsqueeze(-1) * stacked).sum(0)


class DepthAttentionLM(nn.Module):
    """Every sublayer, and the head, reads a softmax mixture of the embedding and all earlier outputs."""

    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, size.width)
        self.branches = nn.ModuleList(
            sublayer(size) for _ in range(size.layers) for sublayer in (Attention, MLP)
        )
        self.queries = nn.ModuleList(DepthQuery(size.width) for _ in range(2 * size.layers + 1))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, NUM_BYTES, bias=False)
        nn.init.normal_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        # Not zero: no gradient would reach a fresh network.
        nn.init.normal_(self.head.weight, std=HEAD_SCALE / math.sqrt(size.width))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> LanguageOutput:
        """Predict each next byte; with a loss in nats per byte where there are labels."""
        values = [self.embedding(input_ids)]
        for query, branch in zip(self.queries, self.branches, strict=False):
            values.append(branch(query(values)))
        logits = self.head(self.norm(self.queries[-1](values)))
        if labels is None:
            return LanguageOutput(logits)
        return LanguageOutput(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class ScaledBranch(nn.Module):
    """A branch whose output is multiplied by a constant that is not trained."""

    def __init__(self, branch: nn.Module, scale: float):
        super().__init__()
        self.inner, self.scale = branch, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the branch and scale what it gives."""
        return self.scale * self.inner(x)


def make(design: str, size: Size, seed: int, branch_scale: float = 1.0) -> nn.Module:
    """A fresh network of a design; the output of every branch multiplied by ``branch_scale``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if design == "attnres":
            model: nn.Module = DepthAttentionLM(size)
        elif design == "mhc-lite":
            model = SmallLM(design, size, connection=PermutationConnection)
        elif design == "post-ln":
            model = SmallLM("residual", size, connection=PostNorm)
        else:
            model = build(design, size=size, seed=seed)
    if branch_scale == 1.0:
        return model
    if isinstance(model, DepthAttentionLM):
        model.branches = nn.ModuleList(ScaledBranch(branch, branch_scale) for branch in model.branches)
        return model
    connections = [m for m in model.modules() if isinstance(getattr(m, "branch", None), nn.Module)]
    assert connections, f"{type(model).__name__} has no connections"
    for connection in connections:
        connection.branch = ScaledBranch(connection.branch, branch_scale)
    return model


def compiled_copy(model: nn.Module) -> nn.Module:
    """A copy that trains 2 to 3 times as fast: each block, or branch of attention residuals, compiled by itself."""
    copy = deepcopy(model)
    for block in copy.branches if isinstance(copy, DepthAttentionLM) else copy.blocks:
        block.compile(dynamic=False)
    return copy


@contextmanager
def without_blocks(model: nn.Module, left_out: Sequence[int]) -> Iterator[None]:
    """The network without some blocks: the state before them goes on, and nothing reads their outputs."""
    names = ("branches", "queries") if isinstance(model, DepthAttentionLM) else ("blocks",)
    parts = len(names)  # a block of attention residuals has two branches, with a query each
    every = {name: getattr(model, name) for name in names}
    gone = {parts * block + part for block in left_out for part in range(parts)}
    try:
        for name, modules in every.items():
            rest = (module for number, module in enumerate(modules) if number not in gone)
            setattr(model, name, nn.ModuleList(rest))
        yield
    finally:
        for name, modules in every.items():
            setattr(model, name, modules)
