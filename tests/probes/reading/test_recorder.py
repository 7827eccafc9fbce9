"""Does the recorder follow writes in place, name every value's place, and let go of what nobody needs?"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from tests.models.designs.catalogue import DESIGNS
from tests.models.recorded import read_model, recorded

DESIGN = DESIGNS[0]


def test_a_place_names_one_value_and_names_it_in_the_next_forward_too():
    model = DESIGN.build()
    first, _ = recorded(model, DESIGN.batch(0))
    second, _ = recorded(model, DESIGN.batch(1))
    made = [value for value in first.values if value.func is not None]

    places = Counter(first.place(value) for value in made)

    assert max(places.values()) == 1
    assert places == Counter(second.place(value) for value in second.values if value.func is not None)


class Written(nn.Module):
    """Writes into a part of its input's copy through a view, then reads the copy."""

    def forward(self, x):
        copy = x.clone()
        part = copy[:, 1]
        part += 1
        return copy * 2


def test_a_write_through_a_view_makes_a_new_value_and_the_old_one_keeps_its_numbers():
    x = torch.zeros(2, 3)
    graph, output = recorded(Written(), x)
    patch = next(value for value in graph.values if value.name == "patch")
    old, new = patch.args[:2]

    assert torch.equal(output, torch.tensor([[0.0, 2, 0], [0, 2, 0]]))
    assert torch.equal(graph.tensor(patch), output / 2)
    assert graph.depends(graph.outputs[0], new)
    assert old.name == "clone"


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 1024), nn.Linear(1024, 128)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_what_a_branch_computes_inside_is_not_held_and_a_sum_is_made_again_from_what_is_added():
    graph, output = recorded(Wide(), torch.randn(4, 128))
    (added,) = (value for value in graph.values if value.name == "add")

    assert not [v for v in graph.values if v.shape == (4, 1024) and v.held is not None]
    assert added.held is None
    assert torch.equal(graph.tensor(added), output)


class Gated(nn.Module):
    """A gated feed-forward layer after an RMS norm, and an activation of several operations."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        u = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        gate = self.gate(u)
        gate = 0.5 * gate * (1 + torch.tanh(0.8 * (gate + 0.04 * gate.pow(3))))
        return self.down(gate * self.up(u))


class Blocks(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed, self.blocks = nn.Linear(128, 128), nn.ModuleList(blocks)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Tower(nn.Module):
    """A network of its own, of which only what a layer makes of its last state is handed on."""

    def __init__(self):
        super().__init__()
        self.tower, self.out = Blocks([Gated(), Gated()]), nn.Linear(128, 128)

    def forward(self, x):
        return self.out(self.tower(x))


def held_in(graph):
    """The modules in whose calls the large tensors were made that are held."""
    return [graph.path(of) for of in graph.values if of.func and of.held is not None and of.numel > 1000]


@torch.no_grad()  # with a graph, autograd holds them anyway
def test_large_tensors_inside_of_branches_are_let_go_when_the_branch_has_ended():
    graph, output = recorded(Blocks([Gated(), Gated()]), torch.randn(2, 128, 128))

    assert held_in(graph) == ["embed", "blocks.0.down", "blocks.1.down"]
    assert torch.equal(graph.tensor(graph.outputs[0]), output)


@torch.no_grad()
def test_states_of_a_network_inside_of_a_branch_are_held_although_nothing_has_them_any_more():
    model, x = Blocks([Tower()]), torch.randn(2, 128, 128)
    graph, _ = recorded(model, x)
    inner = [memory for memory in read_model(model, x).memories if len(memory.states) == 3]

    assert [path for path in held_in(graph) if "tower" in path] == [
        "blocks.0.tower.embed",
        "blocks.0.tower.blocks.0.down",
        "blocks.0.tower.blocks.1.down",
    ]
    assert [memory.proof for memory in inner] == ["proven"]
