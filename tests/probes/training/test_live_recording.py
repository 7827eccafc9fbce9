"""A recorder writes while the loop runs: what is on disk is what is in memory, and nothing that goes wrong stops the loop."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from depthscope import probes
from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import live_rows, saving
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.probes.training import live_recording
from tests.models.plain_stack import Block, Stack

IDS = torch.arange(10).reshape(2, 5)


def stack() -> Stack:
    return Stack([Block(8) for _ in range(2)], nn.Embedding(16, 8))


class Training:
    """A model and its optimizer, which a checkpoint can bring back."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = stack()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def steps(self, recorder, count: int):
        for _ in range(count):
            loss = self.model(IDS).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            recorder.step(loss)
        return self

    def record(self, **options):
        return probes.record(self.model, gradients=True, weights=True, **options)


def require_same(found: xr.DataTree, expected: xr.DataTree) -> None:
    for run in (found, expected):
        run.attrs = {name: value for name, value in run.attrs.items() if name not in ("created", schema.LIVE)}
    assert json.dumps(found.attrs, sort_keys=True, default=list) == json.dumps(
        expected.attrs, sort_keys=True, default=list
    )
    assert set(found.children) == set(expected.children)
    for node in expected.subtree:
        if node.path != "/":
            xr.testing.assert_identical(found[node.path].to_dataset().load(), node.to_dataset())


def test_the_store_has_what_the_recorder_has(tmp_path):
    training = Training()
    with training.record(store=tmp_path / "a", every=2) as recorder:
        training.steps(recorder, 9)
        with schema.open_run(tmp_path / "a") as growing:
            assert growing.attrs[schema.LIVE]["state"] == "growing"
            assert growing.statistics.step.values.tolist() == [0, 2, 4, 6, 8]
            # Saved once, at the first step, since saving it takes more than its share of so short a training.
            assert growing.attrs["step"] == growing.attrs[schema.LIVE]["state_step"] == 0
    with schema.open_run(tmp_path / "a") as run:
        assert run.attrs[schema.LIVE]["state"] == "finished"
        assert run.attrs[schema.LIVE]["state_step"] == run.attrs["step"] == 8
        require_same(run, recorder.run)


def test_a_resumed_training_gives_the_run_of_one_that_was_not_interrupted(tmp_path):
    store, whole = tmp_path / "a.zarr.zip", Training()
    with whole.record() as expected:
        whole.steps(expected, 8)
    first = Training()
    recorder = first.record(store=store).__enter__()
    first.steps(recorder, 3)
    checkpoint = {key: value.clone() for key, value in first.model.state_dict().items()}
    first.steps(recorder, 2)
    recorder._store._store.close()  # what the kernel does when the process is killed
    recorder.abandon()
    with pytest.raises(FileNotFoundError, match=r"no run at .*the steps .* are in .*a\.zarr\.zip\.live"):
        schema.open_run(store)
    with schema.open_run(tmp_path / "a.zarr.zip.live") as run:
        assert run.attrs[schema.LIVE]["state"] == "killed"
        assert run.statistics.step.values.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FileExistsError, match="has a run already; go on in it with resume=True"):
        Training().record(store=store)
    second = Training()
    second.model.load_state_dict(checkpoint)
    with second.record(store=store, resume=True, first_step=3) as recorder:
        second.steps(recorder, 5)
    with schema.open_run(store) as run:
        assert run.attrs.pop(schema.RESUMED_AT) == [3]
        found = run.statistics.to_dataset().load()
        # Its reservoir counts its own sequences.
        xr.testing.assert_identical(found, expected.run.statistics.to_dataset())
    assert list(tmp_path.iterdir()) == [store]


def test_resuming_goes_on_after_the_last_row_and_begins_where_there_is_none(tmp_path):
    for expected in ([0, 1], [0, 1, 2, 3]):
        training = Training()
        with training.record(store=tmp_path / "a", resume=True) as recorder:
            training.steps(recorder, 2)
        with schema.open_run(tmp_path / "a") as run:
            assert run.statistics.step.values.tolist() == expected
    schema.save_run(recorder.run, tmp_path / "b.zarr.zip")
    with pytest.raises(FileExistsError, match="is a finished run, to which nothing can be added"):
        Training().record(store=tmp_path / "b.zarr.zip", resume=True)


def test_a_block_that_is_entered_twice_goes_on(tmp_path):
    training = Training()
    recorder = training.record(store=tmp_path / "a")
    for _ in range(2):
        with recorder:
            training.steps(recorder, 2)
    with schema.open_run(tmp_path / "a") as run:
        assert run.statistics.step.values.tolist() == [0, 1, 2, 3]


def test_a_second_recorder_writes_nothing_and_its_loop_goes_on(tmp_path):
    one, other = Training(), Training()
    with one.record(store=tmp_path / "a") as recorder:
        one.steps(recorder, 2)
        second = other.record(store=tmp_path / "a", resume=True)
        with pytest.warns(
            probes.ProbeWarning, match=r"nothing is written to .*is being written by another recorder"
        ):
            second.__enter__()
        other.steps(second, 2)
        with pytest.warns(
            probes.ProbeWarning, match=r"not saved: 2 steps are not in .*still in recorder\.run"
        ):
            second.close()
        one.steps(recorder, 1)
    with schema.open_run(tmp_path / "a") as run:
        assert run.statistics.step.values.tolist() == [0, 1, 2]
    assert second.run.statistics.sizes["step"] == 2


def test_a_folder_that_goes_and_comes_back(tmp_path):
    training = Training()
    with training.record(store=tmp_path / "runs" / "a") as recorder:
        training.steps(recorder, 2)
        shutil.rmtree(tmp_path / "runs")
        (tmp_path / "runs").write_text("a file, where the folder was")
        with pytest.warns(
            probes.ProbeWarning, match=r"the steps are not written to .*runs is a file"
        ) as said:
            training.steps(recorder, 2)
        assert len(said) == 1
        (tmp_path / "runs").unlink()
        with pytest.warns(probes.ProbeWarning, match="all steps are written to .* again"):
            training.steps(recorder, 1)
    with schema.open_run(tmp_path / "runs" / "a") as run:
        assert run.statistics.step.values.tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_is_said_once_and_the_steps_come_later(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    training = Training()
    with training.record(store=tmp_path / "a") as recorder:
        training.steps(recorder, 1)
        with monkeypatch.context() as patch:
            patch.setattr(LiveStore, "_write", full)
            with pytest.warns(
                probes.ProbeWarning, match=r"No space left .* every measured step tries again"
            ) as said:
                training.steps(recorder, 3)
            assert len(said) == 1
        with pytest.warns(probes.ProbeWarning, match="are written to .* again"):
            training.steps(recorder, 1)
        # Room for numbers, and none for arrays.
        monkeypatch.setattr(live_recording, "STATE_SHARE", 1e9)
        with monkeypatch.context() as patch:
            patch.setattr(LiveStore, "save_state", full)
            with pytest.warns(
                probes.ProbeWarning, match=r"raw sequences are not saved .*No space left"
            ) as said:
                training.steps(recorder, 2)
            assert len(said) == 1
            with schema.open_run(tmp_path / "a") as run:
                assert run.statistics.step.values.tolist() == [0, 1, 2, 3, 4, 5, 6]
        with pytest.warns(probes.ProbeWarning, match="again"):
            training.steps(recorder, 1)


def test_a_long_training_takes_no_more_declarations_than_a_short_one(tmp_path, monkeypatch):
    monkeypatch.setattr(
        live_rows, "MAX_JSON", 1 << 14
    )  # of a log, in which 16 000 steps would be too many for the test
    training, targets = Training(), IDS % 8
    with training.record(store=tmp_path / "a") as recorder:
        for _ in range(100):
            nn.functional.cross_entropy(training.model(IDS).flatten(0, 1), targets.flatten()).backward()
            recorder.step()  # its task, the loss among it, is another one at every step
    with schema.open_run(tmp_path / "a") as run:
        assert run.statistics.sizes["step"] == 100
        assert run.attrs["task"]["classes"] == 8


def test_what_is_no_store_is_refused_before_the_loop(tmp_path):
    for name in ("a", "a.zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(
                FileExistsError, match=r"has files in it that are no live run|contains thesis\.tex"
            ):
                Training().record(store=tmp_path / name, **options)
        assert (tmp_path / name / "thesis.tex").read_text() == "mine"
    for name in ("file", "c.zarr.zip"):
        (tmp_path / name).write_text("somebody's notes")
    with pytest.raises(FileExistsError, match=r"c\.zarr\.zip exists; replace it with force=True"):
        Training().record(store=tmp_path / "c.zarr.zip")
    with pytest.raises(NotADirectoryError, match="is a file, but"):
        Training().record(store=tmp_path / "file" / "a")


def test_a_block_that_measures_nothing_leaves_nothing(tmp_path):
    for name in ("a", "a.zarr.zip"):
        with probes.record(stack(), store=tmp_path / name, start_step=5):
            pass
    assert not list(tmp_path.iterdir())


def train(training: Training, recorder) -> int:
    """One step, whose loss is its number, so that a row tells whether it is whole."""
    training.model(IDS).square().mean().backward()
    step = recorder.position
    recorder.step(float(step))
    return step


def train_until_killed(store: str) -> None:
    """Print the number of every step that has ended."""
    training = Training()
    with training.record(store=store) as recorder:
        while True:
            print(train(training, recorder), flush=True)  # noqa: T201


def require_whole_rows(store: Path) -> int:
    """Every row is there once and whole; the last step."""
    with schema.open_run(store) as run:
        rows = run["statistics"].to_dataset().load()
        assert np.isfinite(run["trace"]["residual"].values).all()
    steps = rows["step"].values
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
    np.testing.assert_array_equal(rows["loss"], steps)
    assert (rows["token_count"] == 10).all()
    assert np.isfinite(rows["norm_sum"]).all()
    return int(steps[-1])


def test_a_trainer_that_is_killed_loses_no_finished_step_and_can_be_read_meanwhile(tmp_path):
    store = tmp_path / "run"
    code = f"from {__name__} import train_until_killed; train_until_killed({str(store)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert int(trainer.stdout.readline()) == 0
        for _ in range(random.randint(1, 10)):  # at whatever moment the readings end
            require_whole_rows(store)
        trainer.kill()
        finished = trainer.stdout.read().split("\n")[:-1]
    stored = require_whole_rows(store)
    assert stored >= int(finished[-1] if finished else 0)
    training = Training()
    with training.record(store=store, resume=True) as recorder:
        assert train(training, recorder) == stored + 1
    assert require_whole_rows(store) == stored + 1


@pytest.mark.parametrize("name", ["a", "a.zarr.zip"])
def test_without_memory_for_a_file_the_training_goes_on_and_nothing_is_left(tmp_path, monkeypatch, name):
    def no_memory(*_):
        raise MemoryError("there is no room")

    monkeypatch.setattr(saving, "_write_folder", no_memory)
    training = Training()
    with pytest.warns(probes.ProbeWarning) as said, training.record(store=tmp_path / name) as recorder:
        training.steps(recorder, 3)
    assert recorder.run.statistics.sizes["step"] == 3
    sentences = [str(each.message) for each in said]
    assert len(sentences) == 2
    for sentence, words in zip(
        sentences, ("the steps are not written to", "the run was not saved"), strict=True
    ):
        assert words in sentence
        assert "there is no room" in sentence
    assert not list(tmp_path.iterdir())
