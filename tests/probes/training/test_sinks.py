"""Do the trackers that people use get the numbers of a training, under the names of the field?"""

from __future__ import annotations

import math

import pytest
import torch

from depthscope import probes
from depthscope.probes.training.sinks import TensorBoardSink, WandbSink


def train(model, ids, *sinks):
    with probes.record(model, metrics="live", sinks=sinks) as recorder:
        for _ in range(2):
            model(ids)
            recorder.step()
    return recorder


def test_a_sink_gets_named_finite_numbers_of_each_step(models, ids):
    torch.manual_seed(0)
    rows = {}
    recorder = train(models["deepseek"](), ids, rows.__setitem__)
    assert list(rows) == [0, 1]
    numbers = rows[0]
    assert all(isinstance(value, float) and math.isfinite(value) for value in numbers.values())
    metrics = recorder.run["metrics"].to_dataset().isel(step=0)
    gain = metrics["mixing_gain"].sel(direction="forward", reduction="mean").isel(connection=3)
    assert numbers["amax_gain_fwd/connection_3"] == pytest.approx(float(gain))
    largest = metrics["composite_gain"].sel(direction="backward", reduction="max").isel(connection=-1)
    assert numbers["composite_amax_gain_bwd_max/connection_5"] == pytest.approx(float(largest))
    size = metrics["residual_norm"].sel(stream="mean").isel(depth=2)
    assert numbers["residual_norm/depth_2"] == pytest.approx(float(size))
    share = metrics["read_share"].sel(stream="1").isel(connection=0)
    assert numbers["read_share/connection_0/stream_1"] == pytest.approx(float(share))
    assert not any("other_depth" in name for name in numbers)


def test_tensorboard(models, ids, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(0)
    with SummaryWriter(str(tmp_path)) as writer:
        rows = {}
        train(models["llama"](), ids, TensorBoardSink(writer), rows.__setitem__)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0])
    found = events.Scalars("effective_rank/depth_1")
    assert [event.step for event in found] == [0, 1]
    assert found[1].value == pytest.approx(rows[1]["effective_rank/depth_1"], rel=1e-6)


def test_wandb_offline(models, ids, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    torch.manual_seed(0)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="depthscope")
    rows = {}
    train(models["llama"](), ids, WandbSink(run), rows.__setitem__)
    assert run.summary["effective_rank/depth_1"] == pytest.approx(rows[1]["effective_rank/depth_1"])
    assert run.summary["step"] == 1
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))
