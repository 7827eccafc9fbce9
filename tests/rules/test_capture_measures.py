"""A capture measures, a verb judges: it imports no metric, verdict or experiment, and runs the model once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import depthscope as ds

JUDGING = (
    *(
        f"depthscope.diagnostics.{room}"
        for room in ("metrics", "verdicts", "experiments", "quantities", "analysis")
    ),
    *(f"depthscope.probes.{room}" for room in ("settling", "repairs", "interventions", "jacobian", "lens")),
)
SCRIPT = """
import sys, torch, depthscope as ds
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return x + self.linear(x)
def report(after):
    print(*(f"{{name}} after {{after}}" for name in sys.modules if name.startswith({judging!r})))
ds.capture, ds.describe, ds.record
report("import")
model, x = torch.nn.Sequential(Block(), Block()), torch.randn(2, 5, 8)
ds.capture(model, x, gradients=True, loss=lambda output, batch: output.square().mean())
report("capture")
ds.describe(model, x)
report("describe")
with ds.record(model, gradients=True, weights=True) as recorder:
    model(x).square().mean().backward()
    recorder.step()
recorder.run
report("record")
"""


def test_nothing_that_judges_is_imported():
    """By no verb that measures; live metrics and findings of a recording import what they are named for."""
    script = SCRIPT.format(judging=JUDGING)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


class Mixed(nn.Module):
    """Two streams around a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[0.7, 0.3], [0.2, 0.8]]))
        self.branch = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = (x * torch.tensor([0.5, 0.5])[:, None]).sum(-2)
        return self.mix @ x + torch.tensor([1.0, 0.6])[:, None] * self.branch(read).unsqueeze(-2)


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixed() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.stack([x, 2 * x], -2)
        for block in self.blocks:
            state = block(state)
        return state.mean(-2)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_a_model_runs_once(gradients, streams):
    torch.manual_seed(0)
    model = Streams() if streams else nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 8)
    run = ds.capture(model, x, gradients=gradients, loss=lambda output, batch: output.square().mean())
    assert run.attrs["n_streams"] == 1 + streams
    ds.describe(model, x)
    assert len(calls) == 2
