"""Does a run name all that has a depth of its own and lies in no block that is read? Before, after, between and inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from depthscope import probes

WIDTH, TOKENS = 16, 12


class Block(nn.Module):
    """x + F(x)."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.branch(self.norm(x))


def blocks(count, width=WIDTH):
    return nn.ModuleList(Block(width) for _ in range(count))


def run_through(stack, x):
    for block in stack:
        x = block(x)
    return x


class Trunk(nn.Module):
    """An embedding, four blocks, and a head; each network below has something more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.trunk = nn.Linear(5, WIDTH), blocks(4)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.more()

    def forward(self, x):
        return self.head(self.norm(run_through(self.trunk, self.first(x))))

    def more(self):
        """Further parts."""

    def first(self, x):
        """The first state."""
        return self.embed(x) + self.positions


class OneDeepBranch(Trunk):
    """Between two blocks a network of its own is added."""

    def more(self):
        self.deep, self.into, self.out = blocks(3), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = run_through(self.trunk[:2], self.first(x))
        x = x + self.out(functional.gelu(run_through(self.deep, self.into(x))))
        return self.head(self.norm(run_through(self.trunk[2:], x)))


class DeepRouter(Trunk):
    """Blocks weigh the branches of each pair as another network says."""

    def more(self):
        self.other, self.router, self.weights = blocks(4), blocks(3), nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.first(x)
        gates = torch.sigmoid(self.weights(run_through(self.router, x)))
        for n, (one, other) in enumerate(zip(self.trunk, self.other, strict=True)):
            gate = gates[..., n : n + 1]
            x = x + gate * one.branch(one.norm(x)) + (1 - gate) * other.branch(other.norm(x))
        return self.head(self.norm(x))


class DeepHead(Trunk):
    """Blocks on the mean of the tokens, with a quarter of the parameters."""

    def more(self):
        self.deep = blocks(3)

    def forward(self, x):
        x = self.norm(run_through(self.trunk, self.first(x))).mean(1)
        return self.head(run_through(self.deep, x))


class WithoutModules(Trunk):
    """A branch between two blocks has two residuals of parameters of the model itself."""

    def more(self):
        shapes = ((WIDTH, 32), (32, WIDTH), (WIDTH, WIDTH))
        self.deep_up, self.deep_down, self.out = (
            nn.Parameter(torch.randn(2, *shape) / 4) for shape in shapes
        )

    def forward(self, x):
        x = run_through(self.trunk[:2], self.first(x))
        y = functional.layer_norm(x, (WIDTH,))
        for up, down in zip(self.deep_up, self.deep_down, strict=True):
            y = y + torch.relu(functional.layer_norm(y, (WIDTH,)) @ up) @ down
        x = x + functional.gelu(y @ self.out[0])
        return self.head(self.norm(run_through(self.trunk[2:], x)))


def streams(model, x):
    """As mHC: three streams that a matrix mixes, which branches read and write with weights."""
    state = x[..., None, :].expand(*x.shape[:-1], 3, WIDTH)
    for branch, gate in zip(model.deep, model.gates, strict=True):
        gates = gate(state.flatten(-2))
        read, write, mix = gates.split((3, 3, 9), -1)
        mixed = mix.unflatten(-1, (3, 3)).softmax(-1) @ state
        state = mixed + write[..., None] * branch((read[..., None] * state).sum(-2))[..., None, :]
    return state.mean(-2)


def gated_updates(model, x):
    """As highways and GRUs: a gate weighs the state against its update."""
    for branch, gate in zip(model.deep, model.gates, strict=True):
        weight = gate(torch.cat([x, x, x], -1))[..., :1].sigmoid()
        x = (1 - weight) * x + weight * branch(x)
    return x


class InOneBranch(Trunk):
    """Half of the tokens go through a trunk of its own, which is added between two blocks."""

    def __init__(self, memory):
        self.memory = memory
        super().__init__()

    def more(self):
        self.deep = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), *Block().branch) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(3 * WIDTH, 15) for _ in range(3))
        self.down, self.up = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        x = run_through(self.trunk[:2], self.first(x))
        inner = self.memory(self, self.down(x.reshape(len(x), -1, 2 * WIDTH)))
        x = x + self.up(inner).reshape(x.shape)
        return self.head(self.norm(run_through(self.trunk[2:], x)))


class LastBranchAlone(Trunk):
    """Branches read softmax mixtures of all outputs before; the head reads the last output, and no mixture."""

    def more(self):
        self.queries = nn.ParameterList(torch.randn(WIDTH) for _ in range(4))

    def forward(self, x):
        outputs = [self.embed(x)]
        for query, block in zip(self.queries, self.trunk, strict=True):
            stacked = torch.stack(outputs)
            mixed = ((stacked @ query).softmax(0)[..., None] * stacked).sum(0)
            outputs.append(block.branch(block.norm(mixed)))
        return self.head(self.norm(outputs[-1]))


class TwoTracks(Trunk):
    """A post-norm state that branches read, and next to it the sum of their outputs, which the head reads too."""

    def forward(self, x):
        x = total = self.first(x)
        for block in self.trunk:
            y = block.branch(x)
            x, total = block.norm(x + y), total + y
        return self.head(x + self.norm(total))


def batch():
    return torch.randn(2, TOKENS, 5)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (OneDeepBranch, {"deep"}),
        (DeepRouter, {"router"}),
        (DeepHead, {"deep"}),
        (WithoutModules, {"deep_up and 1 more"}),
        (LastBranchAlone, {"trunk.3"}),
        (TwoTracks, {"model"}),
    ],
)
def test_what_has_a_depth_of_its_own_is_named(model, names):
    found = probes.describe(model().eval(), batch())
    assert found.proof == "proven"
    assert names <= {part["module"] for part in found.not_covered}


def test_blocks_around_a_deep_branch_are_a_chain_of_their_own():
    model = OneDeepBranch().eval()
    (part,) = probes.describe(model, batch()).not_covered
    assert (part["blocks"], part["layers"]) == (3, "deep.{i}")
    assert probes.describe(model, batch(), layers=part["layers"]).chains == {"": 4}


@pytest.mark.parametrize("memory", [streams, gated_updates])
def test_whatever_carries_a_memory_inside_of_a_branch_is_named(memory):
    found = probes.describe(InOneBranch(memory).eval(), batch())
    assert found.proof == "proven"
    (part,) = (part for part in found.not_covered if part["module"] == "deep")
    assert "inside of one branch" in part["why"]


def test_nothing_is_named_of_a_model_that_has_nothing_more():
    assert probes.describe(Trunk().eval(), batch()).not_covered == ()
