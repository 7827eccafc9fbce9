"""Are runs analysed by processes beside the server, whatever they are, and do their results reach it?"""

import os
import signal
import subprocess
import sys
import time

import pytest

from depthscope.app.dashboard.state import background, run_differences, run_library
from depthscope.app.dashboard.state.background import Analyses
from depthscope.app.dashboard.state.run_reading import UnreadableRun, version_of
from depthscope.app.figures import Selection
from depthscope.app.readings.kept_readings import kept_summaries, readings_folder
from depthscope.app.tables.differences import as_dict
from depthscope.diagnostics import save_run
from depthscope.diagnostics.errors import InputError


@pytest.fixture
def root(tmp_path, make_run, monkeypatch):
    save_run(make_run("residual", layers=2, gradients=False, weights=False), tmp_path / "a.zarr.zip")
    (tmp_path / "torn.zarr.zip").write_bytes(b"nonsense")
    monkeypatch.setattr(run_library, "_roots", [tmp_path.resolve()])
    run_library._cache.clear()
    return tmp_path.resolve()


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_is_analysed_elsewhere_and_found_here(root, monkeypatch):
    analyses = Analyses(most=1)
    monkeypatch.setattr(run_library, "_beside", [analyses])
    monkeypatch.setattr(run_library, "read", None)  # not by this process
    listed = run_library.list_runs()
    assert run_library.summaries_of("a", listed["a"]) is None
    run_library.ask_for(listed)
    until(lambda: all(analyses.result_of(path, version_of(path)) is not None for path in listed.values()))
    (summary,) = run_library.summaries_of("a", listed["a"])
    assert summary.name == "a"
    assert kept_summaries(listed["a"], version_of(listed["a"]))
    torn = run_library.summaries_of("torn", listed["torn"])
    assert isinstance(torn, UnreadableRun)
    assert "cannot be read" in torn.reason
    # Who wants to see a run waits for it, and is told how far it is.
    said = []
    run_library._cache.clear()
    os.utime(listed["a"], ns=(0, 10**18))
    (reading,) = run_library.read_run("a", progress=lambda *done: said.append(done))
    assert reading.analysis.sizes["depth"] == 3
    assert said


def test_large_runs_are_compared_elsewhere_and_the_tests_are_found_here(root, make_run, monkeypatch):
    save_run(make_run("mhc", layers=2, gradients=False, weights=False), root / "b.zarr.zip")
    readings = [run_library.read_run(name)[0] for name in ("a", "b")]
    here = run_differences.differences_between(readings, "effective_rank", Selection())
    assert here
    for kept in readings_folder().glob("*.json"):
        if kept.name.count(".") > 4:  # a test, and no summary
            kept.unlink()
    run_differences._tested.clear()
    monkeypatch.setattr(run_library, "_beside", [Analyses(most=1)])
    monkeypatch.setattr(run_differences, "QUICK_BYTES", 0)
    monkeypatch.setattr(run_differences, "between_runs", None)  # not by this process
    said = []
    found = run_differences.differences_between(
        readings, "effective_rank", Selection(), progress=lambda *done: said.append(done)
    )
    assert [as_dict(each)["in_words"] for each in found] == [as_dict(each)["in_words"] for each in here]
    assert said
    # Why it cannot be done is said here.
    (root / "b.zarr.zip").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        run_differences.differences_between(readings, "effective_rank", Selection())


BEGIN = background._process


def killed():
    process = BEGIN()
    os.kill(process.pid, signal.SIGKILL)
    return process


def other(code):
    return lambda: subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def not_started():
    raise OSError("no memory for another process")


ENDS = {
    "was ended by SIGKILL, perhaps for its memory. Analyse it by itself: depthscope analyze": killed,
    "ended with exit status 3": other("import sys; input(); sys.exit(3)"),
    "gave an answer that cannot be read": other("print('{\"progress\": [1', flush=True); input(); input()"),
    "No process could be started to analyse it: no memory for another process": not_started,
}


def test_a_process_that_gives_no_answer_is_said_and_others_go_on(root, monkeypatch):
    begin = iter([*ENDS.values(), BEGIN])
    monkeypatch.setattr(background, "_process", lambda: next(begin)())
    analyses = Analyses(most=1)
    path = root / "a.zarr.zip"
    for number, said in enumerate([*ENDS, None]):
        os.utime(path, ns=(0, 10**18 + number))  # another version is another chance
        analyses.ask({"a": path})
        until(lambda: analyses.result_of(path, version_of(path)) is not None)
        reason = analyses.result_of(path, version_of(path))
        assert reason == "" if said is None else said in reason
