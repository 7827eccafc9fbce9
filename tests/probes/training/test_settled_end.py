"""At the end of a loop, what the last measured step suspects is tried on its batch; and what the loss is of is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from depthscope import diagnostics, probes
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.verdicts import age


class Block(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.norm, self.inner, self.scale = nn.LayerNorm(16), nn.Linear(16, 16), scale

    def forward(self, x):
        return x + self.scale * self.inner(self.norm(x)).tanh()


class Model(nn.Module):
    def __init__(self, *scales: float):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block(scale) for scale in scales)
        self.calls = 0

    def forward(self, ids):
        self.calls += 1
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def not_young(monkeypatch):
    """Three steps are enough here to be judged as a network whose age is not known."""
    monkeypatch.setattr(age, "FIRST_STEPS", 0)


IDLE, BUSY = (1.0, 1.0, 1e-5, 1.0, 1.0), (1.0,) * 5


def recorded(model, **options):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probes.record(model, gradients=True, **options) as recorder:
        for _ in range(3):
            ids = torch.randint(0, 32, (4, 12))
            optimizer.zero_grad()
            output = model(ids)
            functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            recorder.step()
    return recorder.run


def weights_after(**options):
    torch.manual_seed(1)
    model = Model(*IDLE)
    recorded(model, **options)
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.usefixtures("not_young")
def test_a_suspicion_is_settled_when_the_block_ends():
    run = recorded(Model(*IDLE), settle=10)
    (result,) = (each for each in run.attrs["consequences"] if each["verdict"] == "idle_layer")
    assert result["depths"] == [3, 3]
    assert abs(result["output_change"]) < 0.01
    idle = next(f for f in diagnostics.judge(diagnostics.analyze(run)) if f.verdict == "idle_layer")
    assert idle.settled == "shown"
    assert "Without the step to depth 3" in idle.sentence


@pytest.mark.usefixtures("not_young")
def test_a_saved_run_has_the_results(tmp_path):
    recorded(Model(*IDLE), settle=10, store=tmp_path / "a.zarr.zip")
    with diagnostics.schema.open_run(tmp_path / "a.zarr.zip") as run:
        assert run.attrs["consequences"]


def test_nothing_suspected_costs_no_forward():
    model = Model(*BUSY)
    recorded(model, settle=10)
    assert model.calls == 3


def test_the_training_is_the_same():
    (plain, plain_state), (settled, state) = weights_after(), weights_after(settle=10)
    assert all(torch.equal(a, b) for a, b in zip(plain, settled, strict=True))
    assert torch.equal(plain_state, state)


@pytest.mark.parametrize("settle", [-1])
def test_a_negative_number_is_refused(settle):
    with pytest.raises(InputError, match="expected 0 or more"):
        probes.record(Model(*BUSY), settle=settle)


def test_a_recorded_run_knows_what_its_loss_is_of():
    run = recorded(Model(*BUSY))
    task = run.attrs["task"]
    assert task["classes"] == 32
    assert task["guessing"] == pytest.approx(math.log(32))
    assert task["loss"] == pytest.approx(float(run.statistics["loss"][-1]))
