"""Does the Python of README.md run, as it stands?"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.small_models import llama

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore::depthscope.probes.training.notices.ProbeWarning")
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = llama()
    ids = torch.randint(1, 64, (3, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    names = {
        "model": model,
        "batch": batch,
        "loader": [batch] * 3,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "array": np.random.default_rng(0).normal(size=(20, 8)),
    }
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    # One block: a second one would need names of its own here.
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # Compiled under its name, so that a traceback points to README.md.
    exec(compile(block, str(README), "exec"), names)
    assert "residual" in capsys.readouterr().out
    assert (tmp_path / "a.zarr").exists()
    assert names["analysis"].sizes["depth"] == 4
