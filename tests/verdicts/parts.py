"""What are the branches of the zoo's blocks made of? Attention, recurrences, mixers of tokens, MLPs and experts.

Shapes: B batch, T token, D feature, h head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from tests.verdicts.plans import Plan

PATCHES = 16  # of an image of 16 × 16


class Attention(nn.Module):
    """Attention by explicit weights, so that they can be seen where they are computed."""

    def __init__(self, plan: Plan, *, causal: bool = True):
        super().__init__()
        self.heads = plan.heads
        self.qkv = nn.Linear(plan.width, 3 * plan.width)
        self.out = nn.Linear(plan.width, plan.width)
        self.softmax = nn.Softmax(-1)
        self.causal = causal

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(later, -math.inf)
        return self.out((self.softmax(logits) @ v).transpose(1, 2).flatten(2))


class Recurrence(nn.Module):
    """h_t = a_t h_{t−1} + (1 − a_t) v_t, gated: a diagonal state space whose decay depends on the token."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.into, self.out = nn.Linear(plan.width, 3 * plan.width), nn.Linear(plan.width, plan.width)

    def forward(self, x):
        value, decay, gate = self.into(x).chunk(3, -1)
        decay = (decay + 1.0).sigmoid()
        state, states = torch.zeros_like(value[:, 0]), []
        for place in range(x.shape[1]):
            state = decay[:, place] * state + (1.0 - decay[:, place]) * value[:, place]
            states.append(state)
        return self.out(functional.silu(gate) * torch.stack(states, 1))


class MixedTokens(nn.Module):
    """The token MLP of an MLP-Mixer."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(PATCHES, 2 * PATCHES), nn.GELU(), nn.Linear(2 * PATCHES, PATCHES))

    def forward(self, x):
        return self.net(x.mT).mT


def mlp(plan: Plan) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(plan.width, 2 * plan.width), nn.GELU(), nn.Linear(2 * plan.width, plan.width)
    )


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.up = nn.Linear(plan.width, 4 * plan.width, bias=False)
        self.down = nn.Linear(2 * plan.width, plan.width, bias=False)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * value)


class Experts(nn.Module):
    """Each token goes to two of four experts, weighted by the router's softmax."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.router = nn.Linear(plan.width, 4, bias=False)
        self.experts = nn.ModuleList(mlp(plan) for _ in range(4))

    def forward(self, x):
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, weights[token, place, None] * expert(flat[token]))
        return out.view_as(x)


# What mixes tokens, and what transforms each of them.
MIXERS: dict[str, Callable[[Plan], nn.Module]] = {
    "attention": Attention,
    "attention of all": lambda plan: Attention(plan, causal=False),
    "recurrence": Recurrence,
    "tokens": MixedTokens,
}
TRANSFORMS: dict[str, Callable[[Plan], nn.Module]] = {"mlp": mlp, "gated": Gated, "experts": Experts}


def branches(plan: Plan, mixer: str = "attention", transform: str = "mlp") -> list[nn.Module]:
    """A mixer of tokens, unless it is empty, and a transform of each."""
    return [*([MIXERS[mixer](plan)] if mixer else []), TRANSFORMS[transform](plan)]


def preserve_variance(module: nn.Module) -> None:
    """He's start: torch's own shrinks the signal to a third at every layer, so that branches without norms say nothing."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)


def last_layer(branch: nn.Module) -> nn.Linear:
    """What writes a branch's output."""
    if isinstance(branch, nn.Sequential):
        return branch[-1]
    return branch.net[-1] if isinstance(branch, MixedTokens) else branch.out
