"""Checkpoints become one run by step: the numbers, and what cannot be probed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthscope import analyze, capture, open_run, probe_checkpoints
from depthscope import load as load_checkpoint
from depthscope.app.cli.main import FOUND, main
from depthscope.probes.checkpoints.text_batch import encode_text
from depthscope.probes.history import checkpoint_step, in_order
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
    found = probe_checkpoints(reversed(paths), TEXT, tmp_path / "h.zarr", factory=FACTORY, **SIZES)
    assert found.left_out == {}
    run = open_run(tmp_path / "h.zarr")
    metrics = run.metrics.to_dataset()
    assert metrics.step.values.tolist() == run.statistics.step.values.tolist() == [0, 20, 100]
    assert [of["name"] for of in run.attrs["checkpoints"]] == [path.name for path in paths]
    for number, path in enumerate(paths):
        loaded = load_checkpoint(FACTORY, weights=path)
        one = capture(loaded.model, encode_text(loaded, TEXT, sequences=3, length=16), max_sequences=3)
        expected = analyze(one, metrics="residual_norm").residual_norm[0]
        np.testing.assert_array_equal(metrics.residual_norm[number], expected)
    np.testing.assert_array_equal(run.trace.residual.values, one.trace.residual.values)
    expected = 0.2 * away["embed.weight"].norm() / start["embed.weight"].norm()
    moved = metrics.first_weight_distance.isel(step=2)
    assert float(moved.sel(weight="embed")) == pytest.approx(float(expected), rel=1e-5)
    layers = dict(zip(metrics.weight.values.tolist(), metrics.weight_layer.values.tolist(), strict=True))
    of_blocks = {f"layers.{i}.{name}": i for i in (0, 1) for name in ("norm", "out")}
    assert layers == {"embed": -1, **of_blocks, "norm": -1, "head": -1}


def test_a_broken_checkpoint_is_told_and_the_exit_code_says_so(checkpoints, tmp_path, capsys):
    paths, *_ = checkpoints
    (tmp_path / "t.txt").write_text(TEXT)
    paths[1].write_bytes(paths[1].read_bytes()[:99])
    words = ["--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "h.zarr"), "--length", "16"]
    words = ["probe", *map(str, paths), "--factory", FACTORY, *words, "--sequences", "2", "--json"]
    for _ in range(2):  # the history is renewed without --force
        assert main(words) == FOUND
        printed = capsys.readouterr()
        assert [of["step"] for of in json.loads(printed.out)["checkpoints"]] == [0, 100]
        assert "left out" in printed.err
        assert "step-20" in printed.err


def test_what_is_no_history_stays(checkpoints, tmp_path):
    paths, *_ = checkpoints
    (tmp_path / "h.zarr").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a history of checkpoints"):
        probe_checkpoints(paths, TEXT, tmp_path / "h.zarr", factory=FACTORY, **SIZES)
    assert (tmp_path / "h.zarr").read_text() == "mine"
    with pytest.raises(ValueError, match="no checkpoint could be probed"):
        probe_checkpoints([tmp_path / "step-1"], TEXT, tmp_path / "x.zarr", **SIZES)


def test_steps_are_numbers_and_of_one_checkpoint_each(tmp_path):
    folder = tmp_path / "anything"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    assert checkpoint_step(folder) == 7
    assert [step for step, _ in in_order(["step-100", "step-20", str(folder)])] == [7, 20, 100]
    with pytest.raises(ValueError, match="no step in it"):
        in_order(["step-100", "final"])
    with pytest.raises(ValueError, match="both of step 20"):
        in_order(["step-20", "checkpoint-0020"])


def test_findings_are_stored_with_the_checkpoint_that_has_them_first(checkpoints, tmp_path):
    paths, start, _ = checkpoints
    broken = {
        name: value * (np.nan if name == "layers.1.norm.weight" else 1.0) for name, value in start.items()
    }
    save_file(broken, paths[-1])
    options = SIZES | {"metrics": None}
    run = probe_checkpoints(paths, TEXT, tmp_path / "h.zarr", factory=FACTORY, **options).run
    found = {(each["step"], each["verdict"]) for each in run.attrs["findings"]}
    assert (100, "not_finite") in found
    assert not {(0, "not_finite"), (20, "not_finite")} & found
