"""What a forward keeps for its backward is what autograd saves, and the user's model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from depthscope import probes
from depthscope.probes.model.tensors import OperationsShown
from depthscope.probes.session.kept_bytes import NormInputs

WIDTH, TOKENS = 16, 5


class Net(nn.Module):
    def __init__(self, *, recomputed: bool = False):
        super().__init__()
        self.recomputed, self.calls = recomputed, 0
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH)) for _ in range(3)
        )

    def forward(self, x):
        self.calls += 1
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False) if self.recomputed else x + block(x)
        return x


def measured(model, x):
    run = probes.capture(model, x, gradients=True, loss=lambda output, batch: output.square().mean())
    return probes.settle(run, model, x, forwards=0).attrs["memory"]


def saved_for_backward(model, x):
    """Memory of every tensor that autograd saves, once each, without weights and input: by torch's own hooks."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = (
            tensor  # the tensor too, or its address is given out again
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


@pytest.fixture
def x():
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def test_it_is_what_autograd_saves(x):
    model = Net()
    found = measured(model, x)
    assert found["measured_kept_bytes"] == saved_for_backward(model, x)
    assert found["measured_tokens"] == 2 * TOKENS
    # By hand: the input of the first layer of blocks 1 and 2, and the hidden state of all three after its tanh.
    assert found["measured_kept_bytes"] == 4 * 2 * TOKENS * (2 * WIDTH + 3 * 64)


def test_recomputed_blocks_keep_their_inputs_alone(x):
    found = measured(Net(recomputed=True), x)
    assert found["measured_kept_bytes"] == 4 * 2 * TOKENS * 2 * WIDTH


def test_the_model_notes_nothing_of_it(x):
    model = Net()
    measured(model, x)
    assert model.calls == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_second_forward_that_fails_is_a_reason_and_no_error(x):
    calls = []  # no attribute of the model: what is one is put back after the first forward

    class Twice(Net):
        def forward(self, x):
            if len(calls) == 2:  # one that measures, and one that reads it again
                raise RuntimeError("only twice")
            calls.append(1)
            return super().forward(x)

    found = measured(Twice(), x)
    assert "measured_kept_bytes" not in found
    assert "only twice" in found["not_measured"]


def test_a_compiled_model_is_left_out(x):
    model = Net()
    model.compile(backend="eager")
    assert "compiled" in measured(model, x)["not_measured"]


# --- batch norms of other data are named by what one forward shows


def seen(model, *inputs):
    watched = NormInputs(model)
    with OperationsShown(watched.note):
        for x in inputs:
            model(x)
    return watched.foreign()


@pytest.mark.parametrize(
    ("scale", "shift", "is_other"), [(1.5, 0.0, False), (10.0, 0.0, True), (0.1, 0.0, True), (1.0, 9.0, True)]
)
def test_a_batch_norm_that_was_trained_on_other_data(scale, shift, is_other):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    x = torch.randn(20, 3, 4, 4)
    for _ in range(60):
        model(x)
    of_data = scale * x + shift
    assert seen(model, of_data) == []  # it takes those of the batch
    assert seen(model.eval(), of_data) == (["1"] if is_other else [])
