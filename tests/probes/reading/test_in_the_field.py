"""Small networks after public code that was misread in the field trials, compared with what their own hooks give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope.probes.connections.proof import spread
from depthscope.probes.model.layout import LayoutError

WIDTH, STREAMS = 16, 4


class Norm(nn.Module):
    """A root mean square norm, whose gain comes first."""

    def __init__(self, scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.weight, self.scale = nn.Parameter(1 + torch.rand(WIDTH)), scale

    def forward(self, x):
        size = x.pow(2).mean(-1, keepdim=True)
        return self.scale(self.weight * x, size)


def by_root(x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return x / (size.sqrt() + 1e-6)


class Streams(nn.Module):
    """Hyper-connections, whose branch begins with a norm."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.h_res = nn.Parameter(torch.eye(STREAMS) + 0.1 * torch.rand(STREAMS, STREAMS))
        self.h_pre, self.h_post = nn.Parameter(torch.rand(STREAMS)), nn.Parameter(torch.rand(STREAMS))

    def forward(self, h):
        given = self.mlp(self.norm(torch.einsum("n,btnd->btd", self.h_pre, h)))
        return torch.einsum("mn,btnd->btmd", self.h_res, h) + self.h_post[:, None] * given[:, :, None]


class StreamNetwork(nn.Module):
    def __init__(self, scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks, self.norm = nn.ModuleList(Streams(Norm(scale)) for _ in range(3)), Norm(scale)

    def forward(self, ids):
        h = self.embed(ids)[:, :, None].repeat(1, 1, STREAMS, 1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h.sum(2)))


def ids() -> torch.Tensor:
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


def test_a_norm_may_have_its_gain_before_its_division():
    model = StreamNetwork(by_root).eval()
    run = ds.capture(model, ids())
    assert run.attrs["proof"] == "proven"
    for number, block in enumerate(model.blocks):
        found = torch.as_tensor(run.trace["h_pre"].values[number])
        assert (found - block.h_pre.detach()).abs().max() < 1e-5
    assert "final" in run.trace


def shown(model: nn.Module, names: list[str], batch) -> list[torch.Tensor]:
    """What modules give in a forward."""
    found: list[torch.Tensor] = []
    modules = [model.get_submodule(name) for name in names]
    hooks = [
        module.register_forward_hook(lambda *of: found.append(of[2].detach().clone())) for module in modules
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


class Experts(nn.Module):
    """Experts that take the tokens of all sequences in their order, each a place of its own."""

    def __init__(self):
        super().__init__()
        self.router, self.expert = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        mask = nn.functional.one_hot(chosen, 2)
        rank = (mask.cumsum(0) - 1).mul(mask).sum(-1)
        places = mask[:, :, None] * nn.functional.one_hot(rank, len(tokens))[:, None]
        taken = torch.einsum("tec,td->ecd", places.to(x.dtype), tokens)
        given = torch.einsum("tec,ecd->td", places * weight[:, None, None], self.expert(taken))
        return x + given.view_as(x)


def test_sequences_that_meet_in_experts_are_refused_with_the_layout_that_reads_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, WIDTH), *(Experts() for _ in range(3)), nn.Linear(WIDTH, 20)
    ).eval()
    with pytest.raises(LayoutError, match="layout='B T D'"):
        ds.capture(model, ids())
    trace = ds.capture(model, ids(), layout="B T D").trace
    for found, true in zip(trace.residual.values, shown(model, ["0", "1", "2", "3"], ids()), strict=True):
        assert (torch.as_tensor(found[:, :, 0]) - true).abs().max() < 1e-6


def test_states_are_compared_in_double_precision_whatever_the_default_is():
    count = 1536  # in bfloat16 the last of its indices is the count itself
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert int(spread(count, 64)[-1]) == count - 1
        assert int(spread(2**25, 64)[-1]) == 2**25 - 1
    finally:
        torch.set_default_dtype(torch.float32)
