"""Checkpoints become one history by step: the numbers, resuming, and what cannot be probed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthscope import analyze, capture, open_run
from depthscope.app.cli.command import FINE, FOUND
from depthscope.app.cli.main import main
from depthscope.diagnostics.kernels import similarity
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.text_batch import encode_text
from depthscope.probes.history.history import probe_checkpoints
from depthscope.probes.history.steps import checkpoint_step, in_order
from tests.app.cli.byte_model import build

FACTORY = "tests.app.cli.byte_model:build"
TEXT = "sphinx of black quartz, judge my vow; " * 12
SIZES = {"sequences": 3, "length": 16, "gradients": False, "metrics": ["residual_norm"]}


@pytest.fixture
def checkpoints(tmp_path):
    """Files of a model that moves away from its start, named so that text and numbers sort differently."""
    model = build()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    away = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
    paths = []
    for step in (0, 20, 100):
        state = {name: value + 0.002 * step * away[name] for name, value in start.items()}
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file(state, paths[-1])
    return paths, start, away


def test_a_history_has_the_numbers_of_each_checkpoint(checkpoints, tmp_path):
    paths, start, away = checkpoints
    found = probe_checkpoints(reversed(paths), TEXT, tmp_path / "h.zarr.zip", factory=FACTORY, **SIZES)
    assert (found.left_out, found.num_probed) == ({}, 3)
    run = open_run(tmp_path / "h.zarr.zip")
    metrics = run.metrics.to_dataset()
    assert metrics.step.values.tolist() == [0, 20, 100]
    states = []
    for path, number in zip(paths, range(3), strict=True):
        loaded = load_checkpoint(FACTORY, weights=path)
        batch = encode_text(loaded, TEXT, sequences=3, length=16)
        one = capture(loaded.model, batch, max_sequences=3)
        np.testing.assert_array_equal(
            metrics.residual_norm[number], analyze(one, metrics="residual_norm").residual_norm[0]
        )
        states.append(
            one.trace.residual.values.astype(float)[:, :, :, 0].reshape(one.trace.sizes["depth"], -1, 16)
        )
    np.testing.assert_array_equal(run.trace.residual.values[:, :, :, 0].reshape(states[2].shape), states[2])
    for depth in range(len(states[0])):
        for number in range(3):
            at = metrics.isel(step=number, depth=depth)
            x, first, last = states[number][depth], states[0][depth], states[2][depth]
            expected = float(similarity.linear_cka(x, first, unbiased=True))
            assert float(at.first_checkpoint_cka) == pytest.approx(expected, abs=1e-6)
            expected = float(similarity.linear_cka(x, last, unbiased=True))
            assert float(at.last_checkpoint_cka) == pytest.approx(expected, abs=1e-6)
            expected = np.linalg.norm(x - first) / np.linalg.norm(first)
            assert float(at.first_checkpoint_distance) == pytest.approx(expected, rel=1e-5)
    expected = 0.2 * away["embed.weight"].norm() / start["embed.weight"].norm()
    moved = metrics.first_weight_distance.isel(step=2)
    assert float(moved.sel(weight="embed")) == pytest.approx(float(expected), rel=1e-5)
    layers = dict(zip(metrics.weight.values.tolist(), metrics.weight_layer.values.tolist(), strict=True))
    assert layers == {
        "embed": -1,
        "layers.0.norm": 0,
        "layers.0.out": 0,
        "layers.1.norm": 1,
        "layers.1.out": 1,
    } | {
        "norm": -1,
        "head": -1,
    }


@pytest.mark.slow(one_in=5)
def test_only_what_is_new_is_probed_and_the_last_one_is_the_newest(checkpoints, tmp_path):
    paths, *_ = checkpoints
    out = tmp_path / "h.zarr.zip"
    first = probe_checkpoints(paths[:2], TEXT, out, factory=FACTORY, **SIZES)
    assert float(first.run.metrics.last_checkpoint_cka.isel(step=1, depth=0)) == pytest.approx(1.0)
    again = probe_checkpoints(paths, TEXT, out, factory=FACTORY, **SIZES)
    assert (first.num_probed, again.num_probed) == (2, 1)
    assert float(again.run.metrics.last_checkpoint_cka.isel(step=1, depth=0)) < 0.999
    assert probe_checkpoints(paths, TEXT, out, factory=FACTORY, **SIZES).num_probed == 0
    save_file(build().state_dict(), paths[1])  # the same name, other weights
    assert probe_checkpoints(paths, TEXT, out, factory=FACTORY, **SIZES).num_probed == 1


@pytest.mark.slow(one_in=5)
def test_a_broken_checkpoint_is_told_and_the_exit_code_says_so(checkpoints, tmp_path, capsys):
    paths, *_ = checkpoints
    (tmp_path / "t.txt").write_text(TEXT)
    paths[1].write_bytes(paths[1].read_bytes()[:99])
    words = ["--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "h.zarr.zip"), "--length", "16"]
    words = [
        "probe",
        *map(str, paths),
        "--factory",
        FACTORY,
        *words,
        "--sequences",
        "2",
        "--json",
    ]
    assert main(words) == FOUND
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [of["step"] for of in result["checkpoints"]] == [0, 100]
    assert "left out" in printed.err
    assert "step-20" in printed.err
    save_file(build().state_dict(), paths[1])
    assert main(words) == FINE  # goes on without --force
    assert json.loads(capsys.readouterr().out)["probed"] == 1


def test_what_is_no_history_stays(checkpoints, tmp_path):
    paths, *_ = checkpoints
    (tmp_path / "h.checkpoints").mkdir()
    (tmp_path / "h.checkpoints" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"contains thesis\.tex"):
        probe_checkpoints(paths, TEXT, tmp_path / "h.zarr.zip", factory=FACTORY, **SIZES)
    with pytest.raises(ValueError, match="no checkpoint could be probed"):
        probe_checkpoints([tmp_path / "step-1"], TEXT, tmp_path / "x.zarr.zip", **SIZES)


def test_steps_are_numbers_and_of_one_checkpoint_each(tmp_path):
    folder = tmp_path / "anything"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    assert checkpoint_step(folder) == 7
    ordered, reasons = in_order(["step-100", "step-20", "final", str(folder)])
    assert [step for step, _ in ordered] == [7, 20, 100]
    assert "no step in it" in reasons["final"]
    with pytest.raises(ValueError, match="both of step 20"):
        in_order(["step-20", "checkpoint-0020"])
