"""Nothing that exists is replaced without --force, and that is said before anything is computed."""

from __future__ import annotations

import os
import shutil

import pytest

from depthscope.app.cli.main import FINE, USAGE, main
from depthscope.app.readings import readings
from depthscope.diagnostics import schema


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copy(saved / "residual.zarr.zip", tmp_path / "run.zarr.zip")


LINES = {
    "analyze": ["analyze", "run.zarr.zip", "--metrics", "residual_norm", "--out", "m.zarr.zip"],
    "report": ["export", "run.zarr.zip", "--out", "page.html"],
    "export": ["export", "run.zarr.zip", "--out", "paper"],
}


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_a_second_time_needs_force(words, run, monkeypatch, capsys):
    assert main(words) == FINE
    out = words[-1]
    first = os.stat(out).st_ino
    with monkeypatch.context() as patch:
        patch.setattr(schema, "open_run", lambda *_, **__: pytest.fail("work began"))
        patch.setattr(readings, "analyze", lambda *_, **__: pytest.fail("work began"))
        assert main(words) == USAGE
        assert "--force" in capsys.readouterr().err
    assert os.stat(out).st_ino == first
    assert main([*words, "--force"]) == FINE
    assert os.stat(out).st_ino != first


def test_probe_says_it_before_the_model_is_loaded(run, monkeypatch, capsys):
    (run_folder := os.path.basename(run))
    before = os.stat(run_folder)
    assert main(["probe", "no.such:factory", "--out", run_folder]) == USAGE
    assert "--force" in capsys.readouterr().err
    assert os.stat(run_folder) == before
