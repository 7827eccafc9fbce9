"""`depthscope watch`: a script that knows nothing of it runs as it would, and the model that it trains is recorded."""

from __future__ import annotations

import runpy

import pytest
import torch

from depthscope.app.cli.main import main
from depthscope.diagnostics import schema

SCRIPT = """
import sys
import torch
from torch import nn
from beside import STEPS

assert __name__ == "__main__"
rate = float(sys.argv[sys.argv.index("--rate") + 1])
torch.manual_seed(0)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return x + self.mlp(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(16, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

teacher, model = Model().eval(), Model()
one, other = torch.optim.AdamW(model.blocks.parameters(), lr=rate), torch.optim.SGD(model.embed.parameters(), lr=rate)
scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
for step in range(STEPS):
    ids = torch.randint(0, 16, (2, 5))
    with torch.no_grad():
        wanted = teacher(ids)
        model.eval()(torch.zeros(3, 5, dtype=torch.long))
    loss = (model.train()(ids) - wanted).square().mean()
    scaler.scale(loss).backward()
    scaler.step(one)
    scaler.step(other)
    scaler.update()
    one.zero_grad()
    other.zero_grad()
print(f"{loss.item():.9f}", sum(p.double().sum().item() for p in model.parameters()))
if "--fail" in sys.argv:
    raise ValueError("a mistake of the script")
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("STEPS = 6\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_gives_the_same_with_and_without_and_is_recorded(script, tmp_path, capfd, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), "--rate", "0.01"])
    runpy.run_path(str(script), run_name="__main__")
    plain = capfd.readouterr().out
    out = tmp_path / "runs" / "a"
    words = ["watch", "--out", str(out), "--every", "2", str(script), "--", "--rate", "0.01"]
    another = torch.amp.GradScaler("cpu")  # of another model; the loss scale is not its
    assert main(words) == 0
    assert another.is_enabled()
    said = capfd.readouterr()
    assert said.out == plain
    assert "recorded 2 steps of Model" in said.err
    with schema.open_run(out) as run:
        assert run.attrs["model"] == "Model"
        assert run.attrs[schema.LIVE]["state"] == "finished"
        assert run.statistics.step.values.tolist() == [2, 4]
        assert run.statistics.sequence_count.values.tolist() == [2, 2]
        assert run.statistics.loss_scale.values.tolist() == [64, 64]
        assert run.metrics.learning_rate.values.tolist() == [0.01, 0.01]
    assert main(words) == 2
    assert "has a run already" in capfd.readouterr().err


def test_an_error_of_the_script_is_told_as_python_tells_it(script, tmp_path, capfd):
    assert main(["watch", "--out", str(tmp_path / "a"), str(script), "--", "--rate", "0.01", "--fail"]) == 1
    said = capfd.readouterr().err
    assert "ValueError: a mistake of the script" in said
    assert "Traceback" in said
    idle = tmp_path / "idle.py"
    idle.write_text("print('nothing to train')")
    assert main(["watch", "--out", str(tmp_path / "b"), str(idle)]) == 1
    assert "nothing was recorded: no optimizer updated" in capfd.readouterr().err


COMPILED = """
import os, signal, sys, torch
from torch import nn
from .beside import Block

torch._dynamo.reset()
torch.manual_seed(0)
model = nn.Sequential(Block(), Block())
model.compile(backend=lambda graph, inputs: built.append(1) or graph, fullgraph=True, dynamic=False)
built = []

def train(optimizer, steps):
    for _ in range(steps):
        model(torch.ones(2, 5, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

train(torch.optim.SGD(model.parameters(), lr=0.1), 3)
train(torch.optim.SGD(model.parameters(), lr=0.01), 3)  # a second phase
print(len(built), sum(p.double().sum().item() for p in model.parameters()))
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("saved")
sys.exit(3)
"""


@pytest.mark.filterwarnings("ignore", "error:.*global hooks")
def test_a_module_that_compiles_trains_in_two_phases_and_catches_an_interrupt(tmp_path, capfd, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(COMPILED)
    block = SCRIPT[SCRIPT.index("class Block") : SCRIPT.index("class Model")]
    (package / "beside.py").write_text(f"from torch import nn\n\n{block}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        runpy.run_module("package.train", run_name="__main__", alter_sys=True)
    plain = capfd.readouterr().out
    code = main(
        ["watch", "--out", "a", "--every", "1", "--no-gradients", "--layers", "{i}", "-m", "package.train"]
    )
    said = capfd.readouterr()
    # Nor was anything compiled once more for a hook of ours.
    assert (code, said.out) == (3, plain)
    with schema.open_run("a") as run:
        assert run.attrs["model"] == "Sequential"
        assert run.statistics.step.values.tolist() == [2, 3, 4]
