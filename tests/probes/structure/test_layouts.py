"""Which axis of a state has the sequences, and what is its layout called? By what the operations did, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from depthscope import probes
from depthscope.probes.structure.read_layout import SequenceAxis
from tests.models.recorded import recorded

BATCH, TOKENS, WIDTH = 4, 4, 4  # of one size, so that no size tells one axis from another

WAYS = {
    "as it is": lambda x: x * 2,
    "turned": lambda x: x.transpose(0, 1).contiguous(),
    "folded": lambda x: x.reshape(BATCH * TOKENS, WIDTH),
    "folded, turned": lambda x: x.transpose(0, 1).reshape(BATCH * TOKENS, WIDTH),
    "heads": lambda x: x.view(BATCH, TOKENS, 2, 2).permute(0, 2, 1, 3).reshape(2 * BATCH, TOKENS, 2),
    "copies in front": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1).reshape(3 * BATCH, TOKENS, WIDTH),
    "copies behind": lambda x: x.repeat_interleave(3, 0),
    "a linear layer": lambda x: functional.linear(x, torch.ones(5, WIDTH)),
    "a convolution": lambda x: functional.conv1d(x.mT, torch.ones(5, WIDTH, 1)),
    "a convolution of kernel 1 along the sequences": lambda x: functional.conv1d(
        x.permute(1, 2, 0), torch.ones(5, WIDTH, 1)
    ),
    "a sum over tokens": lambda x: x.sum(1),
    "one token": lambda x: x[:, 1],
    "stacked": lambda x: torch.stack([x, x + 1], 2),
    "joined": lambda x: torch.cat([torch.zeros(BATCH, 1, WIDTH), x], 1),
    "attended": lambda x: torch.softmax(x @ x.mT, -1) @ x,
    "an outer product": lambda x: torch.einsum("btd,bsd->bts", x, x),
    "a norm": lambda x: functional.layer_norm(x, (WIDTH,)),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_sequences_are_where_a_change_of_one_of_them_shows(name, axis):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    given = x if axis == 0 else x.transpose(0, 1).contiguous()
    model = Function(lambda z: WAYS[name](z if axis == 0 else z.transpose(0, 1)))
    graph, before = recorded(model, given)
    sequences = SequenceAxis(graph, BATCH, axis)
    stride = sequences.stride(graph.outputs[0])
    assert stride is not None
    for number in range(BATCH):
        changed = given.clone()
        changed.select(axis, number).add_(torch.randn(TOKENS, WIDTH, generator=generator))
        shows = (model(changed) != before).flatten().nonzero().flatten()
        assert set((shows // stride % BATCH).tolist()) == {number}
    assert not sequences.is_mixed(graph.values[0], graph.values[-1])


MIXED = {
    "an attention": WAYS["attended"],
    "a convolution": lambda x: functional.conv1d(x.mT, torch.ones(5, WIDTH, 3), padding=1).relu(),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_along_the_axis_is_seen(name):
    graph, _ = recorded(Function(MIXED[name]), torch.randn(BATCH, TOKENS, WIDTH))
    first = next(value for value in graph.values if value.kind == "input")
    assert SequenceAxis(graph, TOKENS, 1).is_mixed(first, graph.outputs[0])


class Same(nn.Module):
    """A model whose tokens are all alike and have no positions, so that its first state repeats itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_like_tokens_are_no_streams():
    run = probes.capture(Same().eval(), torch.ones(2, 6, dtype=torch.long))
    assert run.attrs["layout"] == "B T D"
    assert run.trace.residual.shape == (3, 2, 6, 1, 8)
