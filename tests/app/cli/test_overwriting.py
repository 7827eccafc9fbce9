"""Nothing that exists is replaced without --force, and that is said before anything is computed."""

from __future__ import annotations

import os
import shutil

import pytest

from depthscope.app.cli.command import FINE, USAGE
from depthscope.app.cli.main import main
from depthscope.app.readings import readings
from depthscope.diagnostics import schema


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copy(saved / "residual.zarr.zip", tmp_path / "run.zarr.zip")


LINES = {
    "analyze": ["analyze", "run.zarr.zip", "--metrics", "residual_norm", "--out", "m.zarr.zip"],
    "report": ["report", "run.zarr.zip", "--out", "page.html"],
}


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_a_second_time_needs_force(words, run, monkeypatch, capsys):
    assert main(words) == FINE
    out = words[-1]
    first = os.stat(out).st_ino
    with monkeypatch.context() as patch:
        patch.setattr(schema, "open_run", lambda *_, **__: pytest.fail("work began"))
        assert main(words) == USAGE
        assert (
            f"--out '{out}' exists; name another file, or add --force to replace it"
            in capsys.readouterr().err
        )
    assert os.stat(out).st_ino == first
    assert main([*words, "--force"]) == FINE
    assert os.stat(out).st_ino != first


def test_probe_says_it_before_torch_is_imported(run, monkeypatch, capsys):
    (words, text) = (
        ["probe", "some.module:factory", "--out", "run.zarr.zip", "--text", "text.txt"],
        "text.txt",
    )
    with open(text, "w") as file:
        file.write("some words")
    monkeypatch.setattr(
        "depthscope.app.cli.commands.probe.load", lambda args: pytest.fail("the model was loaded")
    )
    before = os.stat("run.zarr.zip")
    assert main(words) == USAGE
    assert "'run.zarr.zip' exists" in capsys.readouterr().err
    assert os.stat("run.zarr.zip") == before


def test_a_run_that_is_analysed_is_written_to_without_force(run):
    assert main(["analyze", "run.zarr.zip", "--metrics", "residual_norm"]) == FINE
    assert "residual_norm" in schema.open_run("run.zarr.zip")["metrics"]


def test_export_refuses_a_folder_of_others_before_it_analyses(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "thesis.tex").write_text("mine")
    monkeypatch.setattr(readings, "analyze", lambda *_, **__: pytest.fail("work began"))
    assert main(["export", "run.zarr.zip", "--out", "paper"]) == USAGE
    assert "depthscope did not write" in capsys.readouterr().err
    assert (tmp_path / "paper" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ["analyze", "run.zarr.zip", "--out", ".zarr.zip"],
        ["probe", "run.zarr.zip", "--out", "below/.zarr"],
        ["report", "run.zarr.zip", "--out", ".html"],
    ],
)
def test_an_ending_without_a_name_is_refused(words, run, tmp_path, capsys):
    assert main(words) == USAGE
    assert f"--out '{words[-1]}' is an ending without a name" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run.zarr.zip"]
