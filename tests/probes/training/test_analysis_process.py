"""Are rows that a second process completes those of the training, and does neither process outlive or disturb the other?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from depthscope import probes
from depthscope.diagnostics import Severity, schema
from depthscope.diagnostics.schema import live_store
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.probes.training.live import live as live_module
from depthscope.probes.training.live.findings import TrainingStopped
from depthscope.probes.training.recorder import ProbeWarning
from tests.probes.training.beside import Beside
from tests.probes.training.killed_trainers import Stack

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="files are handed to a process on POSIX systems alone"
)

IDS = torch.arange(12).reshape(2, 6)
PATIENCE = 120.0  # of a machine that does other things too


def wait_until(condition, seconds=PATIENCE):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


class Training:
    """A small training, step by step, with its recorder."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        self.model = Stack()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.recorder = probes.record(self.model, gradients=True, metrics="live", **options)

    def step(self) -> None:
        loss = self.model(IDS).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recorder.step(float(self.recorder.position))

    @property
    def beside(self):
        return self.recorder._live._beside


@pytest.mark.slow(one_in=2)
def test_rows_come_from_the_process_are_dropped_where_it_is_behind_and_go_on_where_it_dies(tmp_path, capsys):
    inline, training = Training(), Training(analysis="process", store=tmp_path / "run")
    with inline.recorder:
        for _ in range(7):
            inline.step()
    with training.recorder as recorder:
        training.step()  # in the training, which then starts the process
        process = training.beside._process
        wait_until(lambda: not training.beside.is_starting)
        os.kill(process.pid, signal.SIGSTOP)
        training.step()
        training.step()
        assert training.beside.awaited == {1, 2}
        training.step()  # both slots are in use
        assert "step 3: the process of the analysis is behind" not in capsys.readouterr().err
        with schema.open_run(tmp_path / "run") as growing:
            assert growing["statistics"]["step"].values.tolist() == [0, 1, 2, 3]  # none waits for the process
            assert np.isnan(growing["metrics"]["residual_norm"].sel(step=1)).all()
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: training.recorder._collect() or not training.beside.awaited)
        training.step()
        assert capsys.readouterr().err.count("step 3: the process of the analysis is behind") == 1
        # Killed with a row in its hands, which the training then completes itself.
        os.kill(process.pid, signal.SIGSTOP)
        training.step()
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: process.poll() is not None)
        with pytest.warns(ProbeWarning, match="exit code is -9"):
            training.step()
        assert training.beside is None
    live = recorder.run["metrics"].to_dataset()
    assert recorder.run.attrs["live_rows_dropped"] == 1
    assert not recorder.errors
    assert live["step"].values.tolist() == [0, 1, 2, 4, 5, 6]
    expected = inline.recorder.run["metrics"].to_dataset().sel(step=live["step"].values)
    with schema.open_run(tmp_path / "run") as stored:
        assert stored["statistics"]["step"].values.tolist() == list(range(7))
        written = stored["metrics"].to_dataset().sel(step=live["step"].values).load()
    for name in expected.data_vars:
        np.testing.assert_array_equal(live[name].values, expected[name].values, err_msg=name)
        np.testing.assert_array_equal(written[name].values, expected[name].values, err_msg=name)


@pytest.mark.parametrize("ends", [False, True])
def test_findings_come_later_with_the_step_that_was_measured(monkeypatch, ends):
    monkeypatch.setattr(live_module, "AnalysisProcess", Beside)
    told = []
    training = Training(
        analysis="process", stop_on="fail", on_finding=lambda step, finding: told.append((step, finding))
    )
    stopped = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with training.recorder:
                training.step()
                weight = training.model.embed.weight.data
                weight.mul_(30.0)  # first a note, then a failure, in two rows that wait
                training.step()
                weight[3] = torch.nan
                training.step()
                assert training.beside.awaited == {1, 2}
                assert not any(step for step, _ in told)
                if not ends:
                    training.beside.goes_on = True
                    training.step()
        except TrainingStopped as error:
            stopped = error
    severe = [finding for step, finding in told if step == 2 and finding.severity is Severity.FAIL]
    assert severe, told
    assert all(finding.severity < Severity.FAIL for step, finding in told if step < 2)
    sentences = [str(each.message) for each in caught if issubclass(each.category, ProbeWarning)]
    if ends:
        assert stopped is None
        (sentence,) = sentences
        assert sentence.startswith("step 2 has a finding that stop_on ends a training for")
        assert severe[0].sentence in sentence
    else:
        assert sentences == []
        assert stopped.step == 2
        assert stopped.findings[0] == severe[0]
        assert str(stopped).startswith(f"step 2 (its metrics came at step 3): {severe[0].sentence}")


TRAINER = """
import sys, time
from tests.probes.training.test_analysis_process import Training
training = Training(analysis="process", store=sys.argv[1])
with training.recorder:
    training.step()
    while training.beside.is_starting:
        time.sleep(0.02)
    print(training.beside._process.pid, flush=True)
    while True:
        training.step()
        print(training.recorder.position - 1, flush=True)
"""


@pytest.mark.slow(one_in=2)
def test_a_killed_trainer_leaves_no_process_and_every_step_that_it_finished(tmp_path):
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        beside = int(trainer.stdout.readline())
        finished = [int(trainer.stdout.readline()) for _ in range(5)]
        trainer.kill()
        finished += [int(line) for line in trainer.stdout.read().split("\n")[:-1]]
    wait_until(lambda: not is_running(beside))
    with schema.open_run(tmp_path / "run") as run:
        steps = run["statistics"]["step"].values.tolist()
        assert run.attrs["live_store"]["state"] == "killed"
        assert steps == list(range(len(steps)))
        assert steps[-1] >= finished[-1]
        assert np.isfinite(run["statistics"]["norm_sum"].values).all()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which nobody may have waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc").exists()
    return state != "Z"


def test_another_place_is_refused_before_the_loop(monkeypatch):
    with pytest.raises(ValueError, match="expected one of 'inline', 'process', 'auto'"):
        probes.record(Stack(), metrics="live", analysis="thread")
    with pytest.raises(ValueError, match="analysis came without metrics"):
        probes.record(Stack(), analysis="process")
    monkeypatch.setattr(live_module, "is_possible", lambda: False)
    with pytest.raises(ValueError, match="not offered on this system"):
        probes.record(Stack(), metrics="live", analysis="process")
    assert live_module.place_of_analysis("auto") == "inline"
    monkeypatch.setattr(live_module, "is_possible", lambda: True)
    for free, place in ((True, "process"), (False, "inline")):
        monkeypatch.setattr(live_module, "has_free_cores", lambda free=free: free)
        assert live_module.place_of_analysis("auto") == place


def rows_of(path) -> dict[int, tuple[float, list[float]]]:
    history = live_store.read_history(path)
    a, b = (history.values(f"metrics/{name}") for name in "ab")
    return {int(step): (float(a[at]), b[at].tolist()) for at, step in enumerate(history.steps())}


@pytest.mark.parametrize("rows", [2, 3, 8192])
def test_numbers_that_come_later_are_in_their_rows(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(
        live_store, "MAX_LOG_ROWS", rows
    )  # so that logs become columns between a row and what comes later
    store = LiveStore(tmp_path / "run")
    row = {"metrics/a": ((), 0.0), "metrics/c": ((), 0.0), "metrics/b": (("depth",), [0.0, 1.0])}
    store.append(0, row)
    for step in range(1, 9):
        store.append(step, {"metrics/c": float(step)}, complete=False)
        if step > 1:
            store.add_later(
                step - 1, {"metrics/a": step - 1.0, "metrics/b": [step, 2.0], "metrics/d": ((), 1.0 * step)}
            )
    store.add_later(8, {})  # nothing comes after all
    store.add_later(8, {"metrics/a": 1.0})  # and nothing more
    found = rows_of(tmp_path / "run")
    assert found.pop(0) == (0.0, [0.0, 1.0])
    a, b = found.pop(8)
    assert np.isnan([a, *b]).all()
    assert found == {step: (float(step), [step + 1.0, 2.0]) for step in range(1, 8)}
    # One that was declared after the rows that it is of.
    history = live_store.read_history(tmp_path / "run")
    np.testing.assert_array_equal(history.values("metrics/d"), [np.nan, *range(2, 9), np.nan])
    np.testing.assert_array_equal(history.values("metrics/c"), range(9))
    # A resumed training supersedes the row that something was still to come for.
    store.append(9, {}, complete=False)
    store.append(4, {"metrics/a": 40.0})
    store.add_later(9, {"metrics/a": 9.0})
    store.close()
    assert sorted(rows_of(tmp_path / "run")) == [0, 1, 2, 3, 4]
    assert rows_of(tmp_path / "run")[4][0] == 40.0
