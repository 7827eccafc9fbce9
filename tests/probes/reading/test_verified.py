"""Shapes of public code that were once read wrongly and called proven, left out without a word, or beyond any override."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import depthscope as ds
from tests.models import plain_stack

WIDTH = 16


def mlp(norm: bool = True) -> nn.Sequential:
    layers = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(*([nn.RMSNorm(WIDTH)] if norm else []), *layers)


class Lanes(nn.Module):
    """Lanes side by side, to each of which the embedding is added again before every block; the head reads their sum."""

    def __init__(self, lanes: int = 3, depth: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(nn.ModuleList(mlp() for _ in range(lanes)) for _ in range(depth))
        self.keep = nn.Parameter(torch.rand(depth, lanes) + 0.5)
        self.again = nn.Parameter(torch.rand(depth, lanes))

    def forward(self, x):
        first = self.embed(x)
        lanes = [first] * len(self.layers[0])
        for layer, keep, again in zip(self.layers, self.keep, self.again, strict=True):
            lanes = [k * lane + a * first for lane, k, a in zip(lanes, keep, again, strict=True)]
            lanes = [lane + branch(lane) for lane, branch in zip(lanes, layer, strict=True)]
        return self.head(sum(lanes))


class Block(nn.Module):
    """A block with a residual of its own."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = mlp(), mlp()

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Looped(nn.Module):
    """One block with most of the weights in a loop, whose output is added to what the loop carries."""

    def __init__(self, loops: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.loops, self.keep, self.again = (
            loops,
            nn.Parameter(torch.rand(WIDTH)),
            nn.Parameter(torch.rand(WIDTH)),
        )
        self.embed, self.head, self.block = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3), Block()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x):
        first = state = self.embed(x)
        for _ in range(self.loops):
            made = self.block(self.norm(state + first))
            state = self.keep * state + self.again * first + made
        return self.head(state)


class ValueResidual(nn.Module):
    """Attention whose values, wider than the state, are mixed with those of the layer before."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.RMSNorm(WIDTH),
            nn.Linear(WIDTH, 6 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.mix = nn.Sequential(nn.Linear(WIDTH, 2), nn.Sigmoid())

    def forward(self, x, before):
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if before is not None:
            v = v.lerp(before, self.mix(y).transpose(1, 2)[..., None])
        given = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(given.transpose(1, 2).flatten(2)), v


class Values(nn.Module):
    """A transformer whose attention values have a residual of their own, as wide as all heads together."""

    def __init__(self, depth: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        feedforward = (nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH))
        self.layers = nn.ModuleList(
            nn.ModuleList([ValueResidual(), nn.Sequential(nn.RMSNorm(WIDTH), *copy.deepcopy(feedforward))])
            for _ in range(depth)
        )

    def forward(self, x):
        x, values = self.embed(x), None
        for attention, feedforward in self.layers:
            given, values = attention(x, values)
            x = x + given
            x = x + feedforward(x)
        return self.head(x)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))


def test_lanes_side_by_side_are_not_one_stream(batch):
    proof = ds.capture(Lanes().eval(), batch).attrs["proof"]
    assert proof.startswith("unproven: state 2, made in ")
    assert "they lie in lanes side by side" in proof


def test_all_that_a_looped_block_adds_up_is_a_state(batch):
    model, taken = Looped().eval(), []
    for branch in (model.block.attn, model.block.mlp):
        branch.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    run = ds.capture(model, batch)
    assert run.attrs["proof"] == "proven"
    states = [torch.as_tensor(of).squeeze(2) for of in run["trace"].residual.values]
    assert all(
        any(torch.allclose(state, of, atol=1e-6) for state in states) for of in taken[1:]
    )  # the first is a norm of the embedding


OVERRIDES = [{}, {"layout": "B T D"}, {"chain": "layers"}, {"layers": "layers.{i}.0"}]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_overrides_choose_the_state_next_to_a_residual_of_attention_values(overrides, batch):
    model, taken = Values().eval(), []
    for attention, _ in model.layers:
        attention.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    run = ds.capture(model, batch, **overrides)
    assert run.attrs["proof"] == "proven"
    states = [torch.as_tensor(of).squeeze(2) for of in run["trace"].residual.values]
    assert all(any(torch.equal(state, of) for state in states) for of in taken)


def test_a_layout_that_no_state_has_is_refused(batch):
    with pytest.raises(ds.LayoutError, match=r"found are states of the shapes \(2, 7, 16\) in block"):
        ds.capture(Looped().eval(), batch, layout="B T N D H")


class Image(nn.Module):
    """An image through most of the weights, and next to it a few tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.embed = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(5, WIDTH)
        self.convolutions = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(3))
        self.branches, self.head = nn.ModuleList(mlp() for _ in range(2)), nn.Linear(24 + WIDTH, 2)

    def forward(self, image, tokens):
        x, y = self.stem(image), self.embed(tokens)
        for convolution in self.convolutions:
            x = x + convolution(x.relu())
        for branch in self.branches:
            y = y + branch(y)
        return self.head(torch.cat([x.mean((2, 3)), y.mean(1)], 1))


@pytest.mark.parametrize(("layout", "states"), [("B D H W", 4), ("B T D", 3)])
def test_a_layout_chooses_the_states_that_have_its_axes(layout, states, batch):
    given = {"image": torch.randn(2, 3, 6, 8), "tokens": batch}
    trace = ds.capture(Image().eval(), given, layout=layout)["trace"]
    chains = trace.children or {"": trace}
    assert states in [chain.sizes["depth"] for chain in chains.values()]
    assert layout == "B D H W" or len(chains) == 1


class NotResidual(nn.Module):
    """Layers in nested lists, some of which are never called, and nothing is added."""

    def __init__(self, unused: bool):
        super().__init__()
        torch.manual_seed(0)
        extra = [nn.Linear(5, 5)] if unused else []
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5), *extra]) for _ in range(3)
        )

    def forward(self, x):
        for first, second, *_ in self.layers:
            x = second(first(x).relu()).relu()
        return x


@pytest.mark.parametrize("unused", [False, True])
def test_an_error_proposes_only_what_works_on_this_model(unused, batch):
    model = NotResidual(unused).eval()
    with pytest.raises(ds.probes.ChainError, match="no residual stream was found") as error:
        ds.capture(model, batch, chain="layers")
    advice = re.search(r"layers='([^']+)'", str(error.value))
    assert (advice is None) == unused
    if advice:
        assert ds.capture(model, batch, layers=advice[1])["trace"].sizes["depth"] == 7


def test_what_a_pass_found_is_printed(capsys):
    stack = plain_stack.Stack([plain_stack.Block(8) for _ in range(2)], nn.Linear(4, 8))
    for name, line in {
        "record": r"%17 add\[6, 16\] \(2, 5, 8\) blocks.0",
        "branches": r"1 .* blocks.1: reads %17 .*, gives %27 .*, added in \[%28 .*\]",
        "cuts": r"0 post: \[%17 .*\]",
        "connections": r"1 → 2: \['blocks.1'\], off by .*",
        "proof": r"blocks: proven, off by .*",
    }.items():
        ds.describe(stack, torch.randn(2, 5, 4), print_after=name)
        assert re.search(f"^{line}$", capsys.readouterr().out, re.MULTILINE), name
    with pytest.raises(ValueError, match="print_after is 'cut'; closest: 'cuts'"):
        ds.describe(stack, torch.randn(2, 5, 4), print_after="cut")
