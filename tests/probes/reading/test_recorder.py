"""Does the recorder follow writes in place, name every value's place, and let go of what nobody needs?"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from tests.models.designs.catalogue import DESIGNS
from tests.models.recorded import recorded

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
