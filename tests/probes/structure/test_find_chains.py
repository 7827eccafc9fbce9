"""Which blocks are in a chain? All that hand the state on in one container, of whatever class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from tests.models.verdict_models import WIDTH, Block, feedforward, plain, tokens


class Bottleneck(nn.Module):
    """A block of another class, and much smaller than the others."""

    def __init__(self):
        super().__init__()
        self.branch = feedforward(WIDTH, 4)

    def forward(self, x):
        return x + self.branch(x)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_block_of_another_class_is_not_left_out(place):
    model = plain(lambda number: Bottleneck() if number == place else Block())
    run = probes.capture(model, tokens())
    found = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: found.append(output))
    model(tokens())
    assert run["trace"]["depth"].size == 7
    for depth, state in enumerate(found, 1):
        assert torch.equal(torch.from_numpy(run["trace"]["residual"].values[depth, :, :, 0]), state)


def test_a_norm_and_a_head_behind_the_blocks_are_none_of_them():
    torch.manual_seed(0)
    parts = [*(Block() for _ in range(4)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)]
    run = probes.capture(nn.Sequential(*parts), torch.randn(2, 9, WIDTH))
    assert run["trace"]["depth"].size == 5
