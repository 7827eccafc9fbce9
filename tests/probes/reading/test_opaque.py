"""Is the state read rightly next to what a dataflow may not show, and is each row of docs/reading.md tried?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from depthscope.probes.reading.read import Rereading
from tests.models.opaque import (
    BATCH,
    DEPTH,
    KERNELS,
    REFUSED,
    TOKENS,
    WITH_GRADIENTS,
    Blocks,
    Kernel,
    Mlp,
    misnamed,
)
from tests.models.recorded import read_model, recorded

DOCS = Path(__file__).parents[3] / "docs" / "reading.md"


def ids(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, 32, (BATCH, tokens))


def read(kernel: Kernel, *, grad: bool):
    """The reading, the graph, and what the blocks took, by plain hooks in the same forward."""
    torch.manual_seed(0)
    model, taken = kernel.make(), []
    for block in dict.fromkeys(model.blocks):
        block.register_forward_pre_hook(lambda module, args: taken.append(args[0].detach().float().clone()))
    with torch.set_grad_enabled(grad):
        graph, _ = recorded(model, ids())
    return Rereading(graph), graph, taken


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_states_are_what_the_blocks_take(kernel: Kernel):
    found, graph, taken = read(kernel, grad=KERNELS.index(kernel) % 2 == 0)
    memory = found.memories[0]

    assert (len(found.memories), len(memory.states)) == (1 + kernel.further, 1 + DEPTH)
    assert all(each.is_proven for each in found.memories)
    assert memory.casts == kernel.casts
    assert [branch.layer for branch in memory.branches] == list(range(DEPTH))
    for state, given in zip(memory.states, taken, strict=False):
        own = [graph.tensor(graph.values[number]).float() for number in state.values]
        if sum(of.numel() for of in own) == given.numel():
            torch.testing.assert_close(own[0].reshape(given.shape), given)


@pytest.mark.parametrize("kernel", WITH_GRADIENTS, ids=lambda kernel: kernel.name)
def test_what_left_pytorch_is_a_part_of_its_branch_where_gradients_show_it(kernel: Kernel):
    assert read(kernel, grad=True)[0].memories[0].is_proven
    assert not read(kernel, grad=False)[0].memories


@pytest.mark.parametrize("kernel", REFUSED, ids=lambda kernel: kernel.name)
def test_sums_that_no_operation_shows_are_refused_by_name(kernel: Kernel):
    found, _, _ = read(kernel, grad=True)

    assert not found.memories
    assert "nothing is known of" in found.refused
    assert "in the model, which may hide the sums" in found.refused


def test_forwards_of_another_length_are_read_anew():
    torch.manual_seed(0)
    model = Blocks(Mlp)
    reading = Rereading(recorded(model, ids())[0])
    reading.keep(reading.memories[0])

    for tokens in (TOKENS, 9, 9):
        memory = reading.again(recorded(model, ids(tokens))[0])
        assert memory.is_proven
        assert memory.token_shape == (BATCH, tokens)


class FoldedKernel(nn.Module):
    """Every second sum is one that no operation shows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = REFUSED[0].make().step(block, x) if number % 2 else x + block(x)
        return x


def test_sums_of_which_some_are_not_shown_are_not_proven():
    found = read_model(FoldedKernel(), ids())

    assert not any(memory.is_proven for memory in found.memories)


@pytest.mark.parametrize("step", [lambda b, x: misnamed(x) + b(x), lambda b, x: misnamed(x + b(x))])
def test_the_name_of_a_library_operation_says_nothing(step):
    found = read_model(Blocks(Mlp, step), ids())

    assert not any(memory.is_proven for memory in found.memories)


def test_every_row_of_the_documentation_is_tried():
    rows = re.findall(r"^\| ([^|]+?) +\|", DOCS.read_text(), re.MULTILINE)
    tried = {kernel.name for kernel in [*KERNELS, *WITH_GRADIENTS, *REFUSED]}

    assert {row for row in rows if row != "a network with" and not row.startswith("-")} == tried
