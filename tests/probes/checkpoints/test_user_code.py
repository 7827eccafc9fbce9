"""Errors of the user's own code: one sentence with their file, line and line of code; ours keep their traceback."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from depthscope import load as load_checkpoint
from depthscope.app.cli.main import USAGE, main
from depthscope.probes.checkpoints.errors import CheckpointError, errors_of_user_code, is_model_error
from depthscope.probes.checkpoints.own_files import own_file

MODEL = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)
        def forward(self, x):
            return x + self.up(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(256, 8)
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.head = nn.Linear(8, 256)
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def make():
        return Net()
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request) -> str:
    monkeypatch.chdir(tmp_path)
    return f"users_{abs(hash(request.node.name)) % 10**9}"


def written(name: str, code: str) -> None:
    Path(f"{name}.py").write_text(textwrap.dedent(code))


FACTORIES = {
    "def make():\n    return 1 / 0": "ZeroDivisionError: division by zero .*line 2: return 1 / 0",
    "def make(:\n    pass": r"SyntaxError.*line 1: def make\(:",
    "import sys\ndef make():\n    sys.exit(3)": r"SystemExit: 3 .*line 3: sys\.exit\(3\)",
    "def make(): return make()": "RecursionError",
    "def make(): raise BaseException('odd')": "BaseException: odd",
    "from math import nothing": "ImportError: cannot import name 'nothing'",
    "import torch\ndef make(): return torch.nn.Linear(-5, 3)": r"RuntimeError.*torch\.nn\.Linear\(-5, 3\)",
    "class E(Exception):\n    def __str__(self): return 1 / 0\ndef make(): raise E": r"own code, E \(",
    "def make(): raise ValueError('a\\nb\\x1b[31m' * 1000)": r"ValueError: a \(",
}


@pytest.mark.parametrize("code", FACTORIES)
def test_a_factory_that_fails_is_shown_as_theirs(module, code):
    written(module, code)
    with pytest.raises(CheckpointError, match="stops with an error of its own code") as caught:
        load_checkpoint(f"{module}:make")
    assert re.search(FACTORIES[code], str(caught.value))
    assert f"{module}.py" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_their_ctrl_c_stays_one(module):
    written(module, "def make(): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(f"{module}:make")


def test_what_a_factory_prints_is_no_result(module, capsys):
    written(module, MODEL.replace("return Net()", "print('hello'); return Net()"))
    load_checkpoint(f"{module}:make")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise ValueError('my own')", "ValueError: my own"),
        ("raise SystemExit(0)", "SystemExit"),
        ("return self.head(input_ids)", r"RuntimeError.*return self\.head\(input_ids\)"),
        ("return self.forward(input_ids)", "RecursionError"),
    ],
)
def test_a_forward_that_fails_is_shown_as_theirs(module, line, words, capsys):
    written(module, MODEL.replace("x = self.embed(input_ids)", line))
    assert main(["describe", f"{module}:make"]) == USAGE
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("depthscope describe: the model stops with an error of its own code")
    assert f"{module}.py, line 19" in err
    assert re.search(words, err)


@pytest.mark.parametrize("change", ["return Net().to('meta')", "m = Net(); m.x = nn.LazyLinear(3); return m"])
def test_a_model_without_data_is_refused(module, change):
    written(module, MODEL.replace("return Net()", change))
    with pytest.raises(CheckpointError, match="parameters without data"):
        load_checkpoint(f"{module}:make")


def test_our_own_error_is_not_theirs():
    with pytest.raises(TypeError) as caught:
        own_file(3, "x")  # the innermost frame is ours: nothing of theirs was called
    assert not is_model_error(caught.value)


def test_a_checkpoint_error_inside_passes_unchanged():
    with pytest.raises(CheckpointError, match=r"^as it is$"), errors_of_user_code("'x'"):
        raise CheckpointError("as it is")
