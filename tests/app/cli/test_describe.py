"""describe --weights-only: a page, JSON, and one line where the checkpoint cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthscope.app.cli.main import FINE, USAGE, main

LOGITS = torch.tensor([[2.0, 0.0], [1.0, 0.0]])  # source by destination


def known(checkpoint: Path) -> str:
    """The same checkpoint with a model type that is known."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v4"}))
    return str(checkpoint)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Two streams, two layers, one connection in each; and a configuration whose model type nobody knows."""
    tensors = {"embed.weight": torch.zeros(16, 32)}
    for layer in range(2):
        tensors[f"layers.{layer}.hc_attn_fn"] = torch.zeros(8, 64)
        tensors[f"layers.{layer}.hc_attn_base"] = torch.cat([torch.zeros(4), LOGITS.flatten()])
        tensors[f"layers.{layer}.hc_attn_scale"] = torch.tensor([0.1, 0.2, 0.3])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "hc_mult": 2, "hc_eps": 0.0})
    )
    return tmp_path


def test_page_names_connections_products_and_settings(checkpoint, capsys):
    assert main(["describe", known(checkpoint), "--weights-only"]) == FINE
    out = capsys.readouterr().out
    assert "(deepseek_v4): 2 mhc connections, 2 streams of width 32, F32" in out
    assert "read         4 of 7 tensors in 1 file; no model was built" in out
    assert "hc_sinkhorn_iters 20 (assumed: config.json does not tell), hc_eps 0" in out
    row = next(line for line in out.splitlines() if line.startswith("layers.1.hc_attn"))
    assert row.split()[1] == "0.1/0.2/0.3"
    assert "composite    layers: 2 matrices, gain forward 1 backward 1" in out


def test_json_holds_the_static_matrix(checkpoint, capsys):
    assert main(["describe", known(checkpoint), "--weights-only", "--json"]) == FINE
    printed = json.loads(capsys.readouterr().out)
    # doubly stochastic 2 × 2: [[p, 1 - p], [1 - p, p]] where (p/(1 - p))² = e^(2 + 0 - 0 - 1), unchanged by Sinkhorn
    p = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(printed["connections"][0]["h_res"], [[p, 1 - p], [1 - p, p]], atol=1e-9)
    assert printed["connections"][0]["mixing"]["singular_values"] == pytest.approx([1, 2 * p - 1])
    assert printed["composites"][0]["singular_values"] == pytest.approx([1, (2 * p - 1) ** 2])
    assert printed["connections"][0]["h_pre"] == pytest.approx([0.5, 0.5])
    assert printed["checkpoint"] == str(checkpoint)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smollm2"], "no checkpoint at"),
        (["FOLDER"], "has the names of deepseek-v4, and the model type"),
        (
            ["FOLDER", "--layers", "layers", "--dtype", "float32"],
            "--layers and --weights-only do not go together",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(words, said, checkpoint, capsys):
    given = [word.replace("FOLDER", str(checkpoint)) for word in words]
    assert main(["describe", *given, "--weights-only"]) == USAGE
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error
