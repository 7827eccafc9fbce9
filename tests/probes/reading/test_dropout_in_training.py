"""In training a branch may end with a dropout: what it leaves is the branch's output, and H_post is that of the streams."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes

WIDTH, STREAMS = 16, 3


class Block(nn.Module):
    def __init__(self, dropout: nn.Module):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), dropout
        self.mix = nn.Parameter(torch.eye(STREAMS) + 0.2 * torch.randn(STREAMS, STREAMS))
        self.read, self.write = nn.Parameter(torch.rand(STREAMS)), nn.Parameter(torch.rand(STREAMS))

    def forward(self, x):
        branch = self.dropout(torch.tanh(self.linear(self.norm(torch.einsum("n,btnd->btd", self.read, x)))))
        return torch.einsum("mn,btnd->btmd", self.mix, x) + torch.einsum("n,btd->btnd", self.write, branch)


class OwnDropout(nn.Module):
    def forward(self, x):
        return x * ((torch.rand_like(x) > 0.4) / 0.6)


class Net(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(Block(dropout()) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, STREAMS, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.sum(2))


@pytest.mark.parametrize("dropout", [lambda: nn.Dropout(0.4), OwnDropout], ids=["nn.Dropout", "by rand_like"])
def test_a_dropout_is_a_part_of_the_branch(dropout):
    torch.manual_seed(0)
    model, gave = Net(dropout).train(), []
    ids = torch.randint(0, 20, (2, 6))
    for block in model.blocks:
        block.dropout.register_forward_hook(lambda module, args, output: gave.append(output.detach().clone()))
    run = probes.capture(model, ids, max_sequences=2)
    assert run.attrs["proof"] == "proven"
    trace = run["trace"].to_dataset()
    for at, block in enumerate(model.blocks):
        expected = block.write.detach().expand(2, 6, STREAMS)
        torch.testing.assert_close(torch.tensor(trace["h_post"].values[at]), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.tensor(trace["branch_out"].values[at]), gave[-2 + at], rtol=0, atol=0
        )
